"""A sink in front of the recorder that counts acceptance by draft version, and times tokens. Knows events; stores nothing but counts.

`on_admitted` is told each request that leaves the engine's queue, which is when there is room for another one. A sink behind it that raises
is switched off here: the engine would take counts and admissions away with it.
"""

from __future__ import annotations

import itertools
import operator
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tide_pipeline.contracts import RequestClosed, RequestOpened, StepEvent, StepKind
from tide_pipeline.engine.protocol import NullSink, Sink, told
from tide_pipeline.engine.taps import TapRing
from tide_pipeline.serve.histogram import Histogram


@dataclass(slots=True)
class Counts:
    """Request-steps since start. `verify_steps` drafted at least one token; `by_position[i]` are steps that drafted and accepted there."""

    steps: int = 0
    verify_steps: int = 0
    accepted: int = 0
    emitted: int = 0
    by_position: tuple[tuple[int, int], ...] = ()

    def __sub__(self, other: Counts) -> Counts:
        return self._with(other, operator.sub)

    def __add__(self, other: Counts) -> Counts:
        return self._with(other, operator.add)

    def _with(self, other: Counts, do: Callable[[int, int], int]) -> Counts:
        pairs = itertools.zip_longest(self.by_position, other.by_position, fillvalue=(0, 0))
        return Counts(do(self.steps, other.steps), do(self.verify_steps, other.verify_steps), do(self.accepted, other.accepted),
                      do(self.emitted, other.emitted), tuple((do(a[0], b[0]), do(a[1], b[1])) for a, b in pairs))

    def count(self, event: StepEvent) -> None:
        self.steps += 1
        self.verify_steps += bool(event.drafted)
        self.accepted += event.accepted
        self.emitted += len(event.emitted)
        if event.drafted:
            known = self.by_position + ((0, 0),) * (len(event.drafted) - len(self.by_position))
            self.by_position = tuple((drafted + (i < len(event.drafted)), accepted + (i < event.accepted))
                                     for i, (drafted, accepted) in enumerate(known))

    @property
    def acceptance_length(self) -> float:
        """Tokens per verification step, bonus token included; 0 where nothing was verified."""
        return 1.0 + self.accepted / self.verify_steps if self.verify_steps else 0.0

    @property
    def position_rates(self) -> list[float]:
        """[i] = share of the draft tokens at position i that were accepted; 0 where none was drafted."""
        return [accepted / drafted if drafted else 0.0 for drafted, accepted in self.by_position]

    @property
    def first_position_rate(self) -> float:
        return self.position_rates[0] if self.by_position else 0.0


class TallySink:
    """engine.protocol.Sink. The engine's thread counts; `by_version` and `inter_token` may be read from any."""

    def __init__(self, behind: Sink, on_admitted: Callable[[str], None] = lambda request_id: None) -> None:
        self._behind, self._on_admitted = behind, on_admitted
        self._lock = threading.Lock()
        self._by_version: dict[str, Counts] = {}
        self._last_at: dict[str, float] = {}           # of a running request's last token
        self.inter_token = Histogram()
        self.errors = 0                                # of the sink behind
        self.prefill_s = 0.0                           # in prompt chunks

    def by_version(self) -> dict[str, Counts]:
        """Counts so far; steps without a draft are under ""."""
        with self._lock:
            return {version: counts + Counts() for version, counts in self._by_version.items()}

    def attach(self, ring: TapRing, engine_digest: str) -> None:
        self._behind.attach(ring, engine_digest)

    def on_open(self, opened: RequestOpened) -> None:
        self._on_admitted(opened.request_id)
        self._tell(lambda: self._behind.on_open(opened))

    def on_step(self, events: Sequence[StepEvent]) -> None:
        now = time.perf_counter()
        with self._lock:
            for event in events:
                if event.kind is StepKind.PREFILL:
                    self.prefill_s += event.step_ms / 1e3
                else:
                    self._by_version.setdefault(event.draft_version, Counts()).count(event)
        for event in events:
            if event.emitted:
                self._time(event, now)
        self._tell(lambda: self._behind.on_step(events))

    def on_close(self, closed: RequestClosed) -> None:
        self._last_at.pop(closed.request_id, None)
        self._tell(lambda: self._behind.on_close(closed))

    def on_idle(self) -> None:
        self._tell(self._behind.on_idle)

    def close(self) -> None:
        self._behind.close()

    def _tell(self, call: Callable[[], None]) -> None:
        if not told(call):
            self._behind, self.errors = NullSink(), self.errors + 1

    def _time(self, event: StepEvent, now: float) -> None:
        """A step that gave n tokens counts as n equal gaps: its client had them at once, but reads them as a rate."""
        if (before := self._last_at.get(event.request_id)) is not None:
            self.inter_token.observe((now - before) / len(event.emitted), len(event.emitted))
        self._last_at[event.request_id] = now


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
