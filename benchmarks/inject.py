"""Kill the parts of a running local stack as an accident would: SIGKILL, by process id. Knows what each part's command line looks like.

    import inject
    inject.kill(stack.record.stack_id, "trainer")          the ids that were killed; [] when there is none just now
    inject.wait_for(stack_id, "run_worker", 60.0)          until there is one

A part is looked for among the processes that carry the stack's mark, so one whose parent was killed before it is found too; and only
those: a process of another stack, or of anybody else, is never touched. Used by tests/faults and by the soak.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from tide_pipeline.config import StatePaths
from tide_pipeline.stack import record
from tide_pipeline.stack.processes import STACK_ID

POLL_S = 0.2


def _module(*words: str) -> Callable[[Sequence[str]], bool]:
    """`python -m words...`"""
    return lambda line: tuple(line[1 : 2 + len(words)]) == ("-m", *words)


def _program(name: str) -> Callable[[Sequence[str]], bool]:
    return lambda line: line[0].endswith(f"/{name}")


ROLES: dict[str, Callable[[Sequence[str]], bool]] = {
    "mlflow": _module("mlflow", "server"),
    "mlflow_worker": _module("uvicorn"),                   # listens; the server above only starts it
    "supervisor": _module("tide_pipeline.serve.supervisor"),
    "triton": _program("tritonserver"),
    "engine": _program("triton_python_backend_stub"),      # the engine with its draft agent and the lake's writer
    "front": _module("tide_pipeline.serve.front"),
    "keeper": _module("tide_pipeline.serve.keep"),         # restarts what it is named with; all of them
    "dagster_code": _module("dagster", "api", "grpc"),
    "dagster_web": _module("dagster_webserver"),
    "dagster_daemon": _module("dagster._daemon"),
    "run_worker": lambda line: "multiprocessing.spawn" in " ".join(line[1:5]),
    "trainer": _module("tide_pipeline.training"),
}


def processes(stack_id: str, role: str) -> list[psutil.Process]:
    """Of the stack's processes those that play this role, oldest first. Raises KeyError for a role that is not in ROLES."""
    is_it, found = ROLES[role], []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = process.cmdline()                       # empty for a zombie
            if line and is_it(line) and process.environ().get(STACK_ID) == stack_id:
                found.append(process)
    return sorted(found, key=psutil.Process.create_time)


def kill(stack_id: str, role: str, *, every: bool = False) -> list[int]:
    """SIGKILL to the oldest process of a role, or to every one. The ids."""
    chosen = processes(stack_id, role)[: None if every else 1]
    return [process.pid for process in chosen if _kill(process)]


def wait_for(stack_id: str, role: str, timeout_s: float, *, other_than: Sequence[int] = ()) -> psutil.Process:
    """Until a process plays this role that is none of `other_than`. Raises TimeoutError."""
    gives_up = time.monotonic() + timeout_s
    while time.monotonic() < gives_up:
        for process in processes(stack_id, role):
            if process.pid not in other_than:
                return process
        time.sleep(POLL_S)
    raise TimeoutError(f"no {role} within {timeout_s:.0f} s")


def freeze(stack_id: str, role: str) -> Callable[[], None]:
    """SIGSTOP to every process of a role: it is there and does not answer. Returns what lets them go on."""
    stopped = processes(stack_id, role)
    for process in stopped:
        process.suspend()

    def thaw() -> None:
        for process in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    return thaw


def _kill(process: psutil.Process) -> bool:
    try:
        process.send_signal(signal.SIGKILL)                # psutil looks at the start time first: an id used again is not touched
    except psutil.NoSuchProcess:
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:       # its parent may never reap it
            time.sleep(0.01)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill one part of the stack of a state directory (SIGKILL).")
    parser.add_argument("state", type=Path, help="the state directory")
    parser.add_argument("role", choices=sorted(ROLES))
    args = parser.parse_args()
    found = record.load(StatePaths(args.state.resolve()))
    if found is None:
        print(f"no stack is up in {args.state}: start it with `tide up`", file=sys.stderr)
        return 2
    print(f"killed {kill(found.stack_id, args.role) or 'nobody: there is none now'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
