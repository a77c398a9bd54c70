"""One maker of superseding shards at a time, on any storage and without a server. Knows claims; knows no shards.

Whoever wants to rewrite shards of a dataset puts a claim of its own into `_maintenance/` and then lists the folder: it goes on only if
no other claim is alive. Of two that come at once the later lister sees both, so at most one goes on. A claim is dead when it is older
than TTL_S, or when its process, on this machine, is gone. Who holds one stops touching the lake at half its time: `Lease.check`.
Clocks of hosts that share a lake must agree within minutes.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tide_pipeline.capture.names import MAINTENANCE
from tide_pipeline.capture.store import Store, Stored
from tide_pipeline.errors import LakeError

TTL_S = 3600.0
WAIT_S = 30.0                      # for somebody else to finish


@dataclass(frozen=True)
class Lease:
    taken_at: float

    def check(self) -> None:
        """Raises LakeError when this work has taken so long that others may soon think it dead. Call before each change."""
        if time.time() - self.taken_at > TTL_S / 2:
            raise LakeError("the maintenance took too long and stopped half-way, with nothing lost: run it again")


@contextlib.contextmanager
def maintenance(store: Store, wait_s: float = WAIT_S) -> Iterator[Lease]:
    """The right to replace and remove shards of a dataset. Raises LakeError when somebody else keeps it."""
    key, lease = _claim(store, time.monotonic() + wait_s)
    try:
        yield lease
    finally:
        with contextlib.suppress(OSError):
            store.remove(key)


def _claim(store: Store, until: float) -> tuple[str, Lease]:
    while True:
        key, now = f"{MAINTENANCE}/{uuid.uuid4().hex}.json", time.time()
        store.put_bytes(key, json.dumps({"at": now, "pid": os.getpid(), "machine": _machine()}).encode())
        rivals = [claim for claim in store.files(MAINTENANCE) if claim.key != key and claim.name.endswith(".json")]
        alive = [claim for claim in rivals if _is_alive(claim, now)]
        if not alive:
            for claim in rivals:
                store.remove(claim.key)
            return key, Lease(now)
        store.remove(key)
        if time.monotonic() > until:
            raise LakeError(f"somebody else is rewriting shards of {store.root} (claim {alive[0]}): wait for it, "
                            f"or remove the claim if you know that nothing runs")
        time.sleep(random.uniform(0.05, 0.5))              # noqa: S311 - not for secrets


def _is_alive(claim: Stored, now: float) -> bool:
    try:
        held: dict[str, Any] = json.loads(claim.store.read_bytes(claim.key))
    except FileNotFoundError:
        return False
    if now - held["at"] > TTL_S:
        return False
    return held["machine"] != _machine() or Path(f"/proc/{held['pid']}").exists()


def _machine() -> str:
    """This boot of this host, and this namespace of process ids; "" where that can't be told, which equals no other."""
    try:
        boot, space = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return uuid.uuid4().hex
    return f"{socket.gethostname()}/{boot}/{space}"
