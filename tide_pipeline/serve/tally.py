"""A sink in front of the recorder that counts acceptance by draft version. Knows events; stores nothing but counts.

`on_admitted` is told each request that leaves the engine's queue, which is when there is room for another one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tide_pipeline.contracts import RequestClosed, RequestOpened, StepEvent, StepKind
from tide_pipeline.engine.protocol import Sink
from tide_pipeline.engine.taps import TapRing


@dataclass(slots=True)
class Counts:
    """Request-steps since start. `verify_steps` drafted at least one token."""

    steps: int = 0
    verify_steps: int = 0
    accepted: int = 0
    accepted_first: int = 0
    emitted: int = 0

    def __sub__(self, other: Counts) -> Counts:
        return Counts(self.steps - other.steps, self.verify_steps - other.verify_steps, self.accepted - other.accepted,
                      self.accepted_first - other.accepted_first, self.emitted - other.emitted)

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.steps + other.steps, self.verify_steps + other.verify_steps, self.accepted + other.accepted,
                      self.accepted_first + other.accepted_first, self.emitted + other.emitted)

    @property
    def acceptance_length(self) -> float:
        """Tokens per verification step, bonus token included; 0 where nothing was verified."""
        return 1.0 + self.accepted / self.verify_steps if self.verify_steps else 0.0

    @property
    def first_position_rate(self) -> float:
        return self.accepted_first / self.verify_steps if self.verify_steps else 0.0


class TallySink:
    """engine.protocol.Sink. The engine's thread counts; `by_version` may be called from any."""

    def __init__(self, behind: Sink, on_admitted: Callable[[str], None] = lambda request_id: None) -> None:
        self._behind, self._on_admitted = behind, on_admitted
        self._lock = threading.Lock()
        self._by_version: dict[str, Counts] = {}

    def by_version(self) -> dict[str, Counts]:
        """Counts so far; steps without a draft are under ""."""
        with self._lock:
            return {version: counts + Counts() for version, counts in self._by_version.items()}

    def attach(self, ring: TapRing, engine_digest: str) -> None:
        self._behind.attach(ring, engine_digest)

    def on_open(self, opened: RequestOpened) -> None:
        self._on_admitted(opened.request_id)
        self._behind.on_open(opened)

    def on_step(self, events: Sequence[StepEvent]) -> None:
        with self._lock:
            for event in events:
                if event.kind is not StepKind.PREFILL:
                    self._count(event)
        self._behind.on_step(events)

    def on_close(self, closed: RequestClosed) -> None:
        self._behind.on_close(closed)

    def close(self) -> None:
        self._behind.close()

    def _count(self, event: StepEvent) -> None:
        counts = self._by_version.setdefault(event.draft_version, Counts())
        counts.steps += 1
        counts.verify_steps += bool(event.drafted)
        counts.accepted += event.accepted
        counts.accepted_first += event.accepted > 0
        counts.emitted += len(event.emitted)


class Recent:
    """Counts of the last `window_s`, from snapshots taken at each call. For one thread."""

    def __init__(self, tally: TallySink, window_s: float, now: float) -> None:
        self._tally, self._window_s = tally, window_s
        self._past = [(now, tally.by_version())]

    def take(self, now: float) -> tuple[dict[str, Counts], float]:
        """Counts by draft version, and the seconds they cover."""
        counts = self._tally.by_version()
        self._past.append((now, counts))
        while len(self._past) > 2 and self._past[1][0] <= now - self._window_s:
            del self._past[0]
        began, before = self._past[0]
        return {version: counts[version] - before.get(version, Counts()) for version in counts}, max(1e-3, now - began)
