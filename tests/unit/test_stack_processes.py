"""Child processes: log, session, niceness, readiness, and a stop that leaves nothing and touches nobody else's."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tide_pipeline.errors import StackError
from tide_pipeline.stack.processes import STACK_ID, ProcessRef, Service, find, start, stop, wait_until

MARK = "test-stack-processes"
IGNORES_TERM = "trap '' TERM; echo ready; while :; do sleep 0.05; done"


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., ProcessRef]]:
    """Starts shell scripts, and ends them after the test however it went."""
    begun: list[ProcessRef] = []

    def begin(script: str, *, name: str = "child", nice: int = 0, tell_children: bool = False) -> ProcessRef:
        environment = {**os.environ, STACK_ID: MARK}
        service = Service(name, ["sh", "-c", script], environment, tmp_path / "logs" / f"{name}.log", nice, tell_children)
        begun.append(start(service, bound=False))
        return begun[-1]

    yield begin
    stop(begun, MARK, 0.0)


def wait_for(condition: Callable[[], object]) -> None:
    gives_up = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < gives_up, "nothing came of it"
        time.sleep(0.02)


def said(ref: ProcessRef) -> str:
    return Path(ref.log).read_text()


def marked() -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(STACK_ID) == MARK and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_a_child_has_its_own_session_log_and_niceness(begin: Callable[..., ProcessRef]) -> None:
    ref = begin("echo out; echo err >&2; exec sleep 60", nice=3)
    wait_for(lambda: "err" in said(ref))
    process = find(ref)
    assert process is not None and os.getsid(ref.pid) == ref.pid
    assert process.nice() == min(19, os.nice(0) + 3) and said(ref) == "out\nerr\n"


def test_readiness_is_waited_for(begin: Callable[..., ProcessRef]) -> None:
    ref = begin("sleep 0.2; echo listening; exec sleep 60")
    wait_until(lambda: "listening" in said(ref), ref, 20.0)


def test_a_child_that_ends_is_quoted(begin: Callable[..., ProcessRef]) -> None:
    ref = begin("for i in $(seq 1 50); do echo line $i; done; echo 'bad port' >&2; exit 3", name="mlflow")
    with pytest.raises(StackError) as caught:
        wait_until(lambda: False, ref, 20.0)
    text = str(caught.value)
    assert "mlflow ended while it started" in text and "bad port" in text and ref.log in text
    assert "line 50" in text and "line 20\n" not in text, "the end of the log, not all of it"


def test_the_cause_of_an_error_is_quoted_too(begin: Callable[..., ProcessRef]) -> None:
    ref = begin("echo 'ValueError: the cause'; for i in $(seq 1 30); do echo frame $i; done; echo 'LoadError: it failed'; exit 1")
    with pytest.raises(StackError, match=r"ValueError: the cause(.|\n)*frame 30\n(.|\n)*LoadError: it failed"):
        wait_until(lambda: False, ref, 20.0)


def test_a_child_that_takes_too_long_names_the_setting(begin: Callable[..., ProcessRef]) -> None:
    ref = begin("echo still loading; exec sleep 60")
    wait_for(lambda: said(ref))
    with pytest.raises(StackError, match=r"not ready after 0 s .*stack.start_timeout_s(.|\n)*still loading"):
        wait_until(lambda: False, ref, 0.1)


def test_a_program_that_is_not_there(begin: Callable[..., ProcessRef], tmp_path: Path) -> None:
    ref = start(Service("ghost", ["no-such-program-of-ours"], {**os.environ}, tmp_path / "ghost.log"), bound=False)
    with pytest.raises(StackError, match="no-such-program-of-ours can't be run: No such file"):
        wait_until(lambda: False, ref, 20.0)


def test_stop_is_orderly_where_it_can_be(begin: Callable[..., ProcessRef]) -> None:
    ref = begin("trap 'echo goodbye; exit 0' TERM; echo ready; while :; do sleep 0.05; done")
    wait_for(lambda: "ready" in said(ref))
    assert stop([ref], MARK, 20.0) == []
    assert find(ref) is None and "goodbye" in said(ref)


def test_what_ignores_the_signal_is_killed_and_named(begin: Callable[..., ProcessRef]) -> None:
    ref = begin(IGNORES_TERM)
    wait_for(lambda: "ready" in said(ref))
    killed = stop([ref], MARK, 0.3)
    assert len(killed) == 1 and str(ref.pid) in killed[0] and "trap" in killed[0]
    assert find(ref) is None


def test_grandchildren_go_too_even_in_sessions_of_their_own(begin: Callable[..., ProcessRef]) -> None:
    ref = begin("sleep 60 & setsid sleep 61 & setsid sh -c 'sleep 62 & exec sleep 63' & wait")
    wait_for(lambda: len(marked()) >= 5)
    assert stop([ref], MARK, 0.5) == [] and marked() == []


def test_what_a_dead_child_left_behind_is_found(begin: Callable[..., ProcessRef]) -> None:
    ref = begin("setsid sleep 60 & sleep 0.3; exit 0")
    wait_for(lambda: find(ref) is None)
    assert len(marked()) == 1
    stop([ref], MARK, 0.1)
    assert marked() == []


def test_children_are_told_early_where_the_service_says_so(begin: Callable[..., ProcessRef]) -> None:
    script = "(trap 'echo saved; exit 0' TERM; echo ready; while :; do sleep 0.05; done) & trap '' TERM; wait; wait"
    ref = begin(script, tell_children=True)
    wait_for(lambda: "ready" in said(ref))
    assert stop([ref], MARK, 20.0) == [] and "saved" in said(ref)


def test_an_id_that_was_used_again_is_left_alone(begin: Callable[..., ProcessRef]) -> None:
    ref = begin("exec sleep 60")
    foreign = dataclasses.replace(ref, start_ticks=ref.start_ticks - 1)
    assert find(foreign) is None
    assert stop([foreign], "another-stack", 0.1) == []
    assert find(ref) is not None


def test_a_bound_child_ends_with_its_parent(tmp_path: Path) -> None:
    script = ("import os, sys, time; from pathlib import Path; from tide_pipeline.stack.processes import Service, start;"
              "ref = start(Service('bound', ['sleep', '60'], os.environ, Path(sys.argv[1])), bound=True);"
              "print(ref.pid, flush=True); time.sleep(60)")
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "bound.log")], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    wait_for(lambda: Path(f"/proc/{child}/cmdline").read_bytes().startswith(b"sleep"))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    wait_for(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)
