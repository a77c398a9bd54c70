"""What the operating system knows of child processes and ports. Linux; standard library only."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import time
from pathlib import Path

from tide_pipeline.config import StackSettings
from tide_pipeline.errors import PortInUse

PR_SET_PDEATHSIG = 1
HEALTHY_S = 30.0                   # after running this long a death counts as the first one again

_libc = ctypes.CDLL(None, use_errno=True)      # before any fork: loading it in a child could deadlock


def die_with_parent() -> None:
    """For Popen's preexec_fn: this process is killed when the *thread* that forked it ends, so fork from one that stays."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def next_pause_s(before_s: float, ran_s: float, first_s: float, longest_s: float) -> float:
    """How long to wait before starting again what died after `ran_s`, having waited `before_s` the last time: twice as long."""
    return first_s if ran_s > HEALTHY_S else min(2 * before_s, longest_s)


def group_members(group: int) -> list[int]:
    """Processes of a group that are not zombies."""
    return [pid for pid in _every_pid() if _parent_and_group(pid)[1] == group]


def children_of(parent: int) -> list[int]:
    """Its own children that are not zombies."""
    return [pid for pid in _every_pid() if is_child(pid, parent)]


def is_child(pid: int, parent: int) -> bool:
    """Whether this process runs, and is `parent`'s: an id that was used again is somebody else's."""
    return _parent_and_group(pid)[0] == parent


def _every_pid() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def _parent_and_group(pid: int) -> tuple[int, int]:
    """(-1, -1) of one that ended, zombie or not."""
    try:
        state, parent, group = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return -1, -1
    return (int(parent), int(group)) if state != "Z" else (-1, -1)


def end_group(group: int, patience_s: float) -> None:
    """Wait for a group to empty, then kill what is left of it. The group must be one that we made."""
    patience_ends = time.monotonic() + patience_s
    while group_members(group):
        if time.monotonic() > patience_ends:
            for pid in group_members(group):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def choose_ports(stack: StackSettings, names: tuple[str, ...]) -> list[int]:
    """The ports that these settings name, free ones where they say 0. Raises PortInUse, naming the setting to change."""
    held, ports = [], []
    try:
        for name in names:
            wanted = getattr(stack, name)
            held.append(_bind(stack.host, wanted, name))
            ports.append(held[-1].getsockname()[1])
    finally:
        for listener in held:
            listener.close()
    return ports


def _bind(host: str, port: int, name: str) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise PortInUse(f"port {port} of {host} can't be used ({error.strerror}): "
                        f"set stack.{name} to a free port, or to 0 for any") from error
    return listener
