"""Entries of the replicas file changed by several processes at once: each finds its own as it left it."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tide_pipeline.config import project_root
from tide_pipeline.errors import SettingsError
from tide_pipeline.serve.front import change
from tide_pipeline.serve.front.change import change_replicas
from tide_pipeline.serve.front.replicas import ReplicaSpec, read_replicas, write_replicas

CHANGES = 60
SUPERVISOR = """
import sys
from dataclasses import replace
from pathlib import Path
from tide_pipeline.serve.front.change import change_replicas
from tide_pipeline.serve.front.replicas import read_replicas

file, name, changes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
for port in range(1, changes + 1):
    change_replicas(file, lambda spec: replace(spec, url=f"http://127.0.0.1:{port}") if spec.name == name else spec)
    mine = next(spec for spec in read_replicas(file) if spec.name == name)
    if mine.address[1] != port:
        sys.exit(f"{name} wrote port {port} and found {mine.address[1]}")
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_replicas(tmp_path / "replicas.json", [ReplicaSpec(f"replica-{i}", "http://127.0.0.1:9000", weight=i + 1.0) for i in range(3)])
    return tmp_path / "replicas.json"


def test_two_supervisors_at_once_lose_no_change(file: Path) -> None:
    both = [subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(file), name, str(CHANGES)], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=project_root())
            for name in ("replica-0", "replica-1")]
    for process in both:                                   # both have imported everything: now they run at the same time
        assert process.stdout and process.stdout.readline() == "ready\n"
    said = []
    for process in both:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert [spec.address[1] for spec in read_replicas(file)] == [CHANGES, CHANGES, 9000]
    assert [spec.weight for spec in read_replicas(file)] == [1.0, 2.0, 3.0]


def test_a_lock_that_is_never_let_go_is_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(change, "PATIENCE_S", 0.1)
    before = file.read_bytes()
    with (file.with_name(".replicas.json.lock")).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="being changed by another process"):
            change_replicas(file, lambda spec: replace(spec, drain=True))
    assert file.read_bytes() == before
    change_replicas(file, lambda spec: replace(spec, drain=True))
    assert all(spec.drain for spec in read_replicas(file))


def test_a_change_that_the_front_would_refuse_is_not_written(file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(SettingsError, match="weight"):
        change_replicas(file, lambda spec: replace(spec, weight=-1.0))
    assert file.read_bytes() == before
