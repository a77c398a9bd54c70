"""Ports, process groups, Triton's command line and what serving may import."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.serving import until
from tide_pipeline.config import StackSettings
from tide_pipeline.errors import PortInUse, StackError
from tide_pipeline.serve import keep, orphan
from tide_pipeline.serve.front.replicas import write_replicas
from tide_pipeline.serve.process import choose_ports, die_with_parent, end_group, group_members
from tide_pipeline.serve.triton import Installation, Ports, find_triton, link_backends, triton_command

NAMES = ("triton_http_port", "triton_grpc_port", "triton_metrics_port")


def test_free_ports_differ_and_named_ones_are_kept() -> None:
    ports = choose_ports(StackSettings(), NAMES)
    assert len(set(ports)) == 3 and min(ports) > 0
    assert choose_ports(StackSettings(triton_http_port=ports[0]), NAMES)[0] == ports[0]


def test_a_port_in_use_names_its_setting() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortInUse, match=rf"port {port} .* set stack\.triton_grpc_port to a free port"):
            choose_ports(StackSettings(triton_grpc_port=port), NAMES)


def test_end_group_takes_grandchildren_too() -> None:
    child = subprocess.Popen(["sh", "-c", "sleep 60 & sleep 60 & wait"], start_new_session=True)
    while len(group_members(child.pid)) < 3:
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert group_members(child.pid)
    end_group(child.pid, 0.1)
    assert not group_members(child.pid)


def test_a_stub_that_hangs_in_a_call_to_a_dead_server_ends_all_the_same(tmp_path: Path) -> None:
    """Such a call never returns and keeps Python's lock: no thread of Python's could end the process."""
    server = tmp_path / "tritonserver"                           # by name the watched one: it starts the stub, and dies at once
    server.symlink_to("/bin/sh")
    stub = ("import ctypes; from tide_pipeline.serve import orphan; orphan.STUCK_S = orphan.WATCH_S = 0.2; orphan.watch_parent();"
            "ctypes.PyDLL(None).sleep(600)")
    parent = subprocess.run([server, "-c", f'"{sys.executable}" -c "{stub}" & wait'], capture_output=True, text=True, timeout=60)
    assert "Timeout" in parent.stderr


def test_shared_memory_of_a_starter_that_is_gone_is_removed() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    gone, mine = (Path("/dev/shm", f"{orphan.SHM_PREFIX}{pid}-test-{os.getpid()}") for pid in (child.pid, os.getpid()))
    for region in (gone, mine):
        region.touch()
    orphan.remove_stale_shared_memory()
    assert not gone.exists() and mine.exists()
    mine.unlink()


def test_a_child_dies_with_its_parent() -> None:
    script = ("import subprocess, sys, time; from tide_pipeline.serve.process import die_with_parent;"
              "p = subprocess.Popen(['sleep', '60'], preexec_fn=die_with_parent); print(p.pid, flush=True); time.sleep(60)")
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        if not Path(f"/proc/{child}/stat").exists() or Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.02)
    raise AssertionError("the child outlived its parent")


def test_backend_folder_is_links_and_can_be_made_again(tmp_path: Path) -> None:
    for _ in range(2):
        backends = link_backends(find_triton(), tmp_path / "backends")
    parts = sorted((backends / "python").iterdir())
    assert [p.name for p in parts] == ["libtriton_python.so", "triton_python_backend_stub", "triton_python_backend_utils.py"]
    assert all(p.is_symlink() and p.is_file() for p in parts)


def test_a_missing_stub_says_which_python(tmp_path: Path) -> None:
    triton = find_triton()
    with pytest.raises(StackError, match=r"use 3\.11 or 3\.12"):
        link_backends(Installation(triton.server, triton.backend, tmp_path / "nowhere"), tmp_path / "backends")


def test_command_listens_on_loopback_and_closes_management() -> None:
    triton = Installation(Path("/t/server"), Path("/t/backend"), Path("/t/stub"))
    command = triton_command(triton, repository=Path("/r"), backends=Path("/b"), model="tiny", host="127.0.0.1", ports=Ports(1, 2, 3),
                             shm_prefix="x-", admin_secret="s")
    for option in ("--http-address=127.0.0.1", "--grpc-address=127.0.0.1", "--metrics-address=127.0.0.1", "--load-model=tiny",
                   "--model-control-mode=explicit", "--http-restricted-api=shared-memory,model-repository,trace,logging:tide-admin=s"):
        assert option in command


def test_serving_imports_without_the_orchestrators() -> None:
    blocked = ("dagster", "mlflow", "duckdb", "httpx", "typer", "rich", "psutil", "pandas", "transformers", "tritonclient", "pytriton")
    script = (f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
              "from tide_pipeline.serve import agent, client, desk, metrics, repository, supervisor, triton")
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_die_with_parent_can_be_called() -> None:
    assert subprocess.run(["true"], preexec_fn=die_with_parent, check=False).returncode == 0


CHILD = """
import pathlib, sys, time
told = pathlib.Path(sys.argv[1])
told.write_text(told.read_text() + "x" if told.exists() else "x")
sys.exit(int(sys.argv[2])) if len(told.read_text()) > int(sys.argv[3]) else sys.exit(1)
"""


@pytest.mark.parametrize(("ends_with", "deaths", "starts"), [(0, 2, 3), (2, 0, 1)])
def test_a_kept_child_comes_back_until_it_ends_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends_with: int, deaths: int,
                                                         starts: int) -> None:
    """A first start that says "could not" is taken at its word."""
    monkeypatch.setattr(keep, "FIRST_PAUSE_S", 0.01)
    told = tmp_path / "told"
    keeper = keep.Keeper([sys.executable, "-c", CHILD, str(told), str(ends_with), str(deaths)])
    assert keeper.run() == ends_with and told.read_text() == "x" * starts


def test_a_first_start_that_fails_with_any_code_is_final_where_it_is_asked_for(tmp_path: Path) -> None:
    told = tmp_path / "told"
    keeper = keep.Keeper([sys.executable, "-c", CHILD, str(told), "0", "2"], first=True)
    assert keeper.run() == 1 and told.read_text() == "x"


LEAVES_A_WORKER = """
import os, pathlib, subprocess, sys
worker = subprocess.Popen(["sleep", "60"])
told = pathlib.Path(sys.argv[1])
told.write_text(f"{told.read_text() if told.exists() else ''} {worker.pid}")
sys.exit(0) if len(told.read_text().split()) > 1 else os.kill(os.getpid(), 9)
"""


def test_what_a_killed_child_leaves_behind_is_gone_before_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keep, "FIRST_PAUSE_S", 0.01)
    told = tmp_path / "told"
    assert keep.Keeper([sys.executable, "-c", LEAVES_A_WORKER, str(told)], first=True, whole=True).run() == 0
    workers = [int(pid) for pid in told.read_text().split()]
    assert len(workers) == 2
    until(lambda: not any(pid in group_members(os.getpgid(pid)) for pid in workers if Path(f"/proc/{pid}").exists()))


def test_a_front_that_is_killed_comes_back_on_its_port(tmp_path: Path) -> None:
    """By SIGKILL; and SIGTERM to the keeper ends both."""
    write_replicas(tmp_path / "replicas.json", [])
    port = choose_ports(StackSettings(), ("front_port",))[0]
    state = tmp_path / "front.json"
    keeper = subprocess.Popen([sys.executable, "-m", "tide_pipeline.serve.keep", "tide_pipeline.serve.front", "--replicas",
                               str(tmp_path / "replicas.json"), "--state-file", str(state), "--port", str(port)], stderr=subprocess.PIPE)
    try:
        until(lambda: state.is_file() and alive(port))
        first = json.loads(state.read_text())["pid"]
        assert first != keeper.pid
        os.kill(first, signal.SIGKILL)
        until(lambda: json.loads(state.read_text())["pid"] != first and alive(port))
        second = json.loads(state.read_text())["pid"]
        keeper.terminate()
        assert keeper.wait(30) == 0 and not Path(f"/proc/{second}").exists()
    finally:
        keeper.kill()
        errors = keeper.communicate()[1].decode()
    assert "tide_pipeline.serve.front ended with code -9: restart 1" in errors


def alive(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/live", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
