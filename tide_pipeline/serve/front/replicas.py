"""Which replicas the front has, which of them are ready, and whose turn it is. Knows no request.

Told by a JSON file that is replaced whole (`write_replicas`) and read again when it has changed:

    {"replicas": [{"name": "replica-0", "url": "http://127.0.0.1:8000", "weight": 1.0, "drain": false}, ...]}

`weight` (1.0 unless given) is a replica's share of new requests, `drain` (false unless given) ends them; those in flight go on, and
/front/status tells when `in_flight` is 0. `best_until` (0, none, unless given) is for replicas that speculate at every batch size: they
come first while fewer requests are in flight there, and what is more goes to replicas without it (docs/trtllm.md). A replica that is gone
from the file finishes what it has. A file that is missing or wrong changes nothing: the last good one holds, and /front/status says what
is wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tide_pipeline.config import parse
from tide_pipeline.errors import SettingsError, TideError
from tide_pipeline.provenance import write_json
from tide_pipeline.serve.front.http import STATUS_LINE
from tide_pipeline.serve.front.wire import Wire

log = logging.getLogger(__name__)

URL = re.compile(r"http://([A-Za-z0-9.-]+):([0-9]{1,5})/?")
READ_S = 0.2                       # how often the file is looked at
PROBE_S = 0.5                      # how often each replica is asked whether it is ready
PROBE_TIMEOUT_S = 2.0
MAX_IDLE = 32                      # kept connections to a replica


@dataclass(frozen=True)
class ReplicaSpec:
    """One entry of the file."""

    name: str
    url: str
    weight: float = 1.0
    drain: bool = False
    best_until: int = 0            # with fewer requests in flight it is the better choice than a replica without this

    @property
    def address(self) -> tuple[str, int]:
        match = URL.fullmatch(self.url)
        assert match is not None, "checked when it was read"
        return match[1], int(match[2])


@dataclass
class Replica:
    """One replica as the front sees it."""

    spec: ReplicaSpec
    ready: bool = False
    in_flight: int = 0
    served: int = 0
    failed: int = 0                # requests that it did not answer, or not to the end
    turn: float = 0.0              # virtual time of its next request: picks by weight among equally busy ones
    idle: list[Wire] = field(default_factory=list)

    @property
    def takes_requests(self) -> bool:
        return self.ready and not self.spec.drain and self.spec.weight > 0

    def take_idle(self) -> Wire | None:
        """A kept connection that is still whole."""
        while self.idle:
            if (wire := self.idle.pop()).is_idle:
                return wire
            wire.abort()
        return None

    def keep(self, wire: Wire) -> None:
        if self.takes_requests and len(self.idle) < MAX_IDLE:
            self.idle.append(wire)
        else:
            wire.close()

    def close_idle(self) -> None:
        """A Triton that stops waits for every open connection."""
        while self.idle:
            self.idle.pop().close()

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def told(self) -> dict[str, Any]:
        return {**asdict(self.spec), "ready": self.ready, "in_flight": self.in_flight, "served": self.served, "failed": self.failed}


class Fleet:
    """The replicas of a file. `watch` keeps it up to date."""

    def __init__(self, file: Path) -> None:
        self.replicas: dict[str, Replica] = {}
        self.error = ""            # of the file
        self._file = file
        self._seen: tuple[int, int, int] | None = None
        self._clock = 0.0          # virtual time

    def ready(self) -> bool:
        return any(replica.takes_requests for replica in self.replicas.values())

    def pick(self, without: Iterable[Replica] = ()) -> Replica | None:
        """The least busy one for its weight; among equals, by weight."""
        tried = list(without)
        able = [replica for replica in self.replicas.values() if replica.takes_requests and replica not in tried]
        if not able:
            return None
        chosen = min(preferred(able), key=lambda replica: (replica.in_flight / replica.spec.weight, max(replica.turn, self._clock)))
        self._clock = max(chosen.turn, self._clock)
        chosen.turn = self._clock + 1 / chosen.spec.weight
        return chosen

    async def watch(self) -> None:
        """Until cancelled."""
        rounds = 0
        while True:
            try:
                if self.read() or rounds % max(1, round(PROBE_S / READ_S)) == 0:
                    await self.probe()
            except Exception:
                log.exception("the watch over the replicas failed once; it goes on")
            rounds += 1
            await asyncio.sleep(READ_S)

    def read(self) -> bool:
        """Whether the file has changed."""
        try:
            stat = self._file.stat()
            seen = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if seen == self._seen:
                return False
            specs = read_replicas(self._file)
        except (OSError, TideError) as error:
            self._complain(f"{self._file.name} can't be read, the last good one holds: {error.strerror or error}"
                           if isinstance(error, OSError) else str(error))
            return False
        self._seen, self.error = seen, ""
        self._take(specs)
        return True

    async def probe(self) -> None:
        """Ask every replica whether it is ready."""
        replicas = list(self.replicas.values())
        for replica, ready in zip(replicas, await asyncio.gather(*(is_ready(replica.spec) for replica in replicas)), strict=True):
            self.mark(replica, ready)

    def mark(self, replica: Replica, ready: bool) -> None:
        if replica.ready != ready:
            log.info("%s is %s", replica.spec.name, "ready" if ready else "not ready")
        replica.ready = ready
        if not replica.takes_requests:
            replica.close_idle()

    def _take(self, specs: list[ReplicaSpec]) -> None:
        before, self.replicas = self.replicas, {}
        for spec in specs:
            known = before.get(spec.name)
            if known is not None and known.spec.url == spec.url:
                before.pop(spec.name)
                known.spec = spec
            self.replicas[spec.name] = known if known is not None and known.spec is spec else Replica(spec)
        for gone in before.values():
            gone.spec = replace(gone.spec, drain=True)
            gone.close_idle()
        log.info("replicas: %s", ", ".join(f"{spec.name} {'drains' if spec.drain else spec.weight}" for spec in specs) or "none")

    def _complain(self, error: str) -> None:
        if error != self.error:
            log.warning("%s", error)
        self.error = error


def preferred(able: list[Replica]) -> list[Replica]:
    """By load: speculation pays up to a batch size. Then plain replicas, and where there are none, all."""
    within = [replica for replica in able if replica.in_flight < replica.spec.best_until]
    return within or [replica for replica in able if not replica.spec.best_until] or able


def write_replicas(file: Path, replicas: Iterable[ReplicaSpec]) -> None:
    """Replace the file. Raises SettingsError rather than write what the front would refuse."""
    specs = list(replicas)
    _check(specs, str(file))
    write_json(file, {"replicas": [asdict(spec) for spec in specs]})


def read_replicas(file: Path) -> list[ReplicaSpec]:
    """Raises SettingsError, OSError."""
    try:
        raw = json.loads(file.read_bytes())
    except ValueError as error:
        raise SettingsError(f"{file} is not JSON ({error}): write it with write_replicas") from error
    entries = raw.get("replicas") if isinstance(raw, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SettingsError(f'{file} must be {{"replicas": [{{"name": ..., "url": ...}}, ...]}}')
    try:
        specs = [parse(ReplicaSpec, entry, f"{file}: replica {n}") for n, entry in enumerate(entries)]
    except TypeError as error:
        raise SettingsError(f"{file}: a replica needs a name and a url ({error})") from error
    _check(specs, str(file))
    return specs


def _check(specs: list[ReplicaSpec], where: str) -> None:
    if len({spec.name for spec in specs}) != len(specs):
        raise SettingsError(f"{where}: two replicas have one name")
    for spec in specs:
        match = URL.fullmatch(spec.url)
        if match is None or not 0 < int(match[2]) < 65_536:
            raise SettingsError(f"{where}: {spec.name} needs a url such as http://127.0.0.1:8000, got {spec.url!r}")
        if not 0 <= spec.weight <= 1e6:                    # NaN too
            raise SettingsError(f"{where}: the weight of {spec.name} must be from 0 to 1000000, got {spec.weight}")
        if spec.best_until < 0:
            raise SettingsError(f"{where}: best_until of {spec.name} must be 0 (none) or more, got {spec.best_until}")


async def is_ready(spec: ReplicaSpec) -> bool:
    """On a connection of its own."""
    writer = None
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(*spec.address)
            writer.write(f"GET /v2/health/ready HTTP/1.1\r\nHost: {spec.address[0]}\r\nConnection: close\r\n\r\n".encode())
            match = STATUS_LINE.fullmatch((await reader.readline()).decode("latin-1").rstrip("\r\n"))
            return match is not None and match[1] == "200"
    except (OSError, TimeoutError, ValueError):
        return False
    finally:
        if writer is not None:
            writer.close()
