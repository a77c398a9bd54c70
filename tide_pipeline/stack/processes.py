"""Start child processes with a log each, find them again later, stop them whole. Knows process ids, not what runs in them.

A process is known by its id *and* its start time, so one whose id was used again is never touched. Every child carries
TIDE_STACK_ID in its environment and hands it down: what a dead child left behind is found by it.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tide_pipeline.errors import StackError

STACK_ID = "TIDE_STACK_ID"
LEASH = Path(__file__).with_name("leash.py")
PATIENCE_S = 30.0                  # Triton finishes what is in flight and its stub flushes the lake
POLL_S = 0.1
ERROR = re.compile(r"\s*[\w.]*(Error|Exception)\b")


@dataclass(frozen=True)
class Service:
    """What to run. `environment` is the whole of it."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    nice: int = 0
    tell_children: bool = False    # at a stop they are told as early as the process itself


@dataclass(frozen=True, slots=True)
class ProcessRef:
    """A process that we started."""

    name: str
    pid: int
    start_ticks: int               # since boot, from /proc: unlike Unix time it doesn't move when the clock is set
    started_at: float              # Unix seconds
    log: str
    tell_children: bool = False


def start(service: Service, *, bound: bool) -> ProcessRef:
    """Start in a session of its own. `bound`: it is told to end when the calling *thread* ends, so call from one that stays."""
    service.log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-I", "-S", str(LEASH), str(service.nice), str(os.getpid() if bound else 0), *service.command]
    write = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    files = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0), (os.POSIX_SPAWN_OPEN, 1, str(service.log), write, 0o644),
             (os.POSIX_SPAWN_DUP2, 1, 2)]
    pid = os.posix_spawn(sys.executable, command, dict(service.environment), file_actions=files, setsid=True)
    return ProcessRef(service.name, pid, _start_ticks(pid), time.time(), str(service.log), service.tell_children)


def find(ref: ProcessRef) -> psutil.Process | None:
    """The live process, or None when it ended or its id is somebody else's now."""
    with contextlib.suppress(psutil.NoSuchProcess, OSError):
        process = psutil.Process(ref.pid)
        if _start_ticks(ref.pid) == ref.start_ticks and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def wait_until(is_ready: Callable[[], bool], ref: ProcessRef, timeout_s: float) -> None:
    """Raises StackError, with what its log says last, when the process ends first or takes too long."""
    gives_up = time.monotonic() + timeout_s
    while not is_ready():
        if find(ref) is None:
            raise StackError(f"{ref.name} ended while it started: {said(ref)}")
        if time.monotonic() > gives_up:
            raise StackError(f"{ref.name} was not ready after {timeout_s:.0f} s (on a slow machine raise stack.start_timeout_s): "
                             f"{said(ref)}")
        time.sleep(POLL_S)


def said(ref: ProcessRef, lines: int = 12) -> str:
    """The end of its log with the errors before it (Python tells the cause first), and where the rest is."""
    with contextlib.suppress(FileNotFoundError):
        last = [line for line in Path(ref.log).read_text(errors="replace").splitlines()[-300:] if line.strip()]
        tail = [*[line for line in last[:-lines] if ERROR.match(line)][-3:], *last[-lines:]]
        return "\n  ".join(["its log ends with", *tail, f"all of it: {ref.log}"]) if tail else f"it said nothing ({ref.log} is empty)"
    return f"it has no log at {ref.log}"


def stop(refs: Iterable[ProcessRef], stack_id: str, patience_s: float = PATIENCE_S) -> list[str]:
    """SIGTERM to each, patience, SIGTERM to what is left below them, SIGKILL. Returns what had to be killed; nothing is left."""
    found = [(ref, process) for ref in refs if (process := find(ref)) is not None]
    roots = [process for _, process in found]
    everything = _family(roots, stack_id)
    _tell(_below(process for ref, process in found if ref.tell_children), psutil.Process.terminate)
    _tell(roots, psutil.Process.terminate)
    left = _wait(everything, patience_s if roots else 0.0)
    _tell(left, psutil.Process.terminate)
    left = _wait({*left, *_family(left, stack_id)}, 3.0)
    killed = [_title(process) for process in left]
    _tell(left, psutil.Process.kill)
    _wait(left, 5.0)
    return killed


def _start_ticks(pid: int) -> int:
    """Field 22 of /proc/<pid>/stat. Raises OSError when there is no such process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def _family(roots: Iterable[psutil.Process], stack_id: str) -> set[psutil.Process]:
    """The processes, all below them, and whatever carries the stack's mark."""
    roots = list(roots)
    found = {*roots, *_below(roots)}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if stack_id and process.pid != os.getpid() and process.environ().get(STACK_ID) == stack_id:
                found.add(process)
    return found


def _below(roots: Iterable[psutil.Process]) -> set[psutil.Process]:
    found: set[psutil.Process] = set()
    for root in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.update(root.children(recursive=True))
    return found


def _tell(processes: Iterable[psutil.Process], signal: Callable[[psutil.Process], None]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            signal(process)                                # psutil looks at the start time first


def _wait(processes: Iterable[psutil.Process], patience_s: float) -> set[psutil.Process]:
    """Those that are still there; our own children are reaped."""
    _, left = psutil.wait_procs(list(processes), timeout=patience_s)
    return {process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE}


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return f"{process.pid} {subprocess.list2cmdline(process.cmdline())[:80]}"
    return str(process.pid)
