"""End Triton's Python stub when its tritonserver is gone. Standard library only: it watches before anything heavy is imported.

PR_SET_PDEATHSIG would not do: it follows the thread that forked, and tritonserver loads models from threads that end.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

WATCH_S = 0.5
LAST_ACTS_S = 20.0
STUCK_S = 30.0                     # that the watch may be kept from Python's lock
SHM_PREFIX = "tide-"               # of the regions that our tritonservers make; then the process id of what started the server

_parent = 0                        # 0: nobody watches
_last_acts: list[Callable[[], object]] = []


def before_the_end(act: Callable[[], object]) -> None:
    """Have something saved first. It must not call Triton: without a server its calls never return."""
    _last_acts.append(act)


def is_orphan() -> bool:
    """Whether the server is gone. Ask before calling it: a call to a server that is gone keeps Python's lock for ever."""
    return _parent != 0 and os.getppid() != _parent


def watch_parent() -> None:
    """From a thread of its own; the parent may have died before this call."""
    global _parent
    _parent = os.getppid()
    if _is_triton(_parent):
        _end_if_stuck(STUCK_S)
    threading.Thread(target=_watch, args=(_parent,), name="tide-parent-watch", daemon=True).start()


def _watch(parent: int) -> None:
    if _is_triton(parent):
        while os.getppid() == parent:
            _end_if_stuck(STUCK_S)
            time.sleep(WATCH_S)
    _end_if_stuck(LAST_ACTS_S + STUCK_S)
    acting = threading.Thread(target=_act, name="tide-last-acts", daemon=True)
    acting.start()
    acting.join(LAST_ACTS_S)                   # a thread of ours may hang in a call to the server that is gone
    _remove_shared_memory()
    os._exit(1)


def _end_if_stuck(after_s: float) -> None:
    """A call that was under way when the server died keeps the lock, and this thread with it. faulthandler waits in a thread of C's, tells
    where every thread stood and ends the process. Each call puts the end off."""
    faulthandler.dump_traceback_later(after_s, exit=True)


def remove_stale_shared_memory() -> None:
    """Regions of servers whose starter is gone: what a stub leaves that could not end by itself."""
    for region in Path("/dev/shm").glob(f"{SHM_PREFIX}*"):  # noqa: S108 the place is Triton's choice
        starter = region.name.removeprefix(SHM_PREFIX).partition("-")[0]
        if starter.isdigit() and not Path("/proc", starter).exists():
            region.unlink(missing_ok=True)


def _act() -> None:
    for act in _last_acts:
        act()


def _remove_shared_memory() -> None:
    """The region this stub shares with its server is named on its command line; after a SIGKILL nobody else removes it."""
    for argument in Path("/proc/self/cmdline").read_text().split("\0"):
        if argument.startswith(SHM_PREFIX) and "/" not in argument:
            Path("/dev/shm", argument).unlink(missing_ok=True)  # noqa: S108 the place is Triton's choice


def _is_triton(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().startswith("tritonserver")
    except OSError:
        return False
