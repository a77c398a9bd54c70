"""Change the front's replicas file while others may change it too: read, change and replace under a lock. Knows no replica.

Supervisors that bring up successors at one moment, and people who drain, each change their own entry: none of that is lost.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tide_pipeline.serve.front.replicas import ReplicaSpec, read_replicas, write_replicas

PATIENCE_S = 10.0                  # a change takes milliseconds: who holds the lock for longer was stopped in the middle
POLL_S = 0.02


def change_replicas(file: Path, change: Callable[[ReplicaSpec], ReplicaSpec]) -> None:
    """Replace every entry by what `change` makes of it.

    Raises:
        SettingsError: the file is wrong, or would be.
        OSError: it can't be read or written; TimeoutError when somebody else is changing it for too long.
    """
    with _alone(file):
        write_replicas(file, [change(spec) for spec in read_replicas(file)])


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """The lock ends with its process. It lies beside the file, which is replaced and so can't be locked itself."""
    gives_up = time.monotonic() + PATIENCE_S
    with file.with_name(f".{file.name}.lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > gives_up:
                    raise TimeoutError(f"{file} is being changed by another process for {PATIENCE_S:.0f} s: look for one that is "
                                       f"stopped (`fuser {lock.name}`)") from None
                time.sleep(POLL_S)
        yield
