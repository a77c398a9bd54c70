"""What serves, killed under streaming load with two replicas behind the front: server, engine, supervisor, front, and everything of one.

Requests that the killed process was serving may fail; every other one is answered. How long nobody got a token is measured and bounded.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import inject
import pytest

from tests.faults.converged import assert_lake, look, serves_the_record
from tests.faults.load import Load
from tests.faults.loop import Loop, tiny_loop, until
from tests.serving import write_place
from tide_pipeline.serve.client import TritonClient
from tide_pipeline.serve.front.replicas import ReplicaSpec, read_replicas, write_replicas

pytestmark = [pytest.mark.faults, pytest.mark.filterwarnings("ignore::ResourceWarning")]

NOBODY_S = 20.0                    # stated: with a replica left, and the front there, somebody gets a token at least this often
NOTICE_S = 1.0                     # in which a request may still be given to what was just killed
CLIENTS = 3


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    with tiny_loop(tmp_path_factory.mktemp("fleet"), {"serve": {"replicas": 2}}, parts=("replica",)) as made:
        yield made


def ready(loop: Loop) -> int:
    """Replicas that the front sends requests to; 0 while the front is away."""
    try:
        return sum(r["ready"] for r in httpx.get(f"{loop.stack.triton_url}/front/status", timeout=5).json()["replicas"])
    except httpx.HTTPError:
        return 0


def test_a_server_that_comes_back_on_another_port_is_found_by_the_front(tmp_path: Path) -> None:
    """As a successor does (TensorRT-LLM's new draft) whose ports were any free ones."""
    place, file = write_place(tmp_path), tmp_path / "replicas.json"
    write_replicas(file, [ReplicaSpec("replica-0", "http://127.0.0.1:9"), ReplicaSpec("replica-1", "http://127.0.0.1:10")])
    command = [sys.executable, "-m", "tide_pipeline.serve.supervisor", "--config", str(place.config_file), "--state-file",
               str(tmp_path / "state.json"), "--replicas-file", str(file)]
    with subprocess.Popen(command) as supervisor:
        try:
            urls = [spec.url for spec in read_replicas(file)]
            for _ in range(2):
                until(lambda before=urls[0]: read_replicas(file)[0].url != before, "the front was not told")
                urls = [spec.url for spec in read_replicas(file)]
                assert urls[1] == "http://127.0.0.1:10" and TritonClient(urls[0], "tiny").ready()
                os.kill(json.loads((tmp_path / "state.json").read_text())["triton_pid"], signal.SIGKILL)
        finally:
            supervisor.terminate()


@pytest.mark.parametrize("role", ["triton", "engine", "supervisor", "front"])
def test_a_part_killed_under_load_comes_back(loop: Loop, role: str) -> None:
    before = look(loop)
    with Load(loop.client, CLIENTS, name=role) as load:
        until(lambda: len(load.answered) >= 10)
        killed = [p.pid for p in inject.processes(loop.id, role)]
        assert inject.kill(loop.id, role) == killed[:1]
        killed_at = time.monotonic()
        inject.wait_for(loop.id, role, 120.0, other_than=killed)
        back_s = until(lambda: ready(loop) == 2, "not all replicas are ready again") + time.monotonic() - killed_at
        healed_at, answered = time.monotonic(), len(load.answered)
        until(lambda: len(load.answered) >= answered + 10)
    served_then, sent_after = load.broken(killed_at + NOTICE_S)
    load.assert_same_answers()
    gap_s = load.gap_s(killed_at, healed_at)
    print(f"FAULT {role}: whole again after {back_s:.1f} s, nobody got a token for {gap_s:.1f} s, {served_then} requests broke off, "
          f"{sent_after} sent later failed: {[f.error[:90] for f in load.failures if f.sent > killed_at + NOTICE_S][:4]}")
    assert gap_s < NOBODY_S
    assert sent_after == 0, load.failures
    assert role == "front" or served_then <= 2 * CLIENTS, load.failures        # there is one front: while it is away everybody is refused
    until(lambda: serves_the_record(loop))
    assert_lake(loop, before)
