"""Decide which requests' states are stored: Algorithm 1 of the paper, made safe. Pure: no clock, no files, no tensors.

Per workload two EMAs (emas.py) follow acceptance: first-position rate of each finished request that drafted.
collecting starts when   short < reference - eps                 reference = long, or the best long EMA since the draft changed
collecting stops when    short >= reference - eps / 2  and  short >= HEALTHY_RATE
The best EMA makes slow decay visible, which the difference of two EMAs can't see. The floor keeps a workload that was never served
well from counting as normal. One request in ten is collected whatever happens: old workloads need a replay set.
"""

from __future__ import annotations

from dataclasses import dataclass

from tide_pipeline.capture.change import PageHinkley
from tide_pipeline.capture.emas import Emas
from tide_pipeline.config import CaptureSettings

ALWAYS_SHARE = 0.1                 # of a workload's requests is collected anyway in auto mode
HEALTHY_RATE = 0.5                 # a draft that misses the first token every other time is worth training, whatever its past
MAX_WORKLOADS = 256                # tags come from clients; the least recently seen one is forgotten, and starts anew when it returns


@dataclass(slots=True)
class _Watch:
    """One workload since its draft last changed."""

    change: PageHinkley
    emas: Emas
    collecting: bool = True
    best: float = 0.0              # highest long EMA, once it remembers enough requests to be a bar
    asked: int = 0                 # requests that asked should_collect


class CollectionControl:
    """Not thread-safe: one thread decides; `state()` may be read from any."""

    def __init__(self, settings: CaptureSettings) -> None:
        self._settings = settings
        self._opted_out = frozenset(settings.opted_out_tenants)
        self._watches: dict[str, _Watch] = {}
        self._hour = -1
        self._spent_bytes = 0

    def observe(self, workload: str, acceptance: float) -> None:
        """Tell the first-position rate of a finished request that drafted."""
        s, watch = self._settings, self._watch(workload)
        emas = watch.emas
        emas.update(acceptance)
        if emas.seen < s.init_requests:
            return
        if emas.remembers:                         # eight lucky requests must not set a bar that nothing reaches again
            watch.best = max(watch.best, emas.long)
        reference = max(emas.long, watch.best)
        if watch.change.update(acceptance) or emas.short < reference - s.epsilon:
            watch.collecting = True
        elif emas.short >= max(reference - s.epsilon / 2, HEALTHY_RATE):
            watch.collecting = False

    def should_collect(self, workload: str, tenant: str, now: float | None = None) -> bool:
        """Whether the states of a new request are stored. Ask once per request; `now` lets a new hour refill the budget."""
        only = self._settings.workloads
        if self._settings.mode == "off" or tenant in self._opted_out or (only and workload not in only):
            return False
        if now is not None:
            self._roll(now)
        if self._spent_bytes >= self._settings.max_bytes_per_hour:
            return False
        watch = self._watch(workload)
        watch.asked += 1
        share = self._settings.share if watch.collecting or self._settings.mode == "on" else ALWAYS_SHARE
        return int(watch.asked * share) > int((watch.asked - 1) * share)

    def spend(self, num_bytes: int, now: float) -> None:
        """Count stored bytes against the budget of the clock hour."""
        self._roll(now)
        self._spent_bytes += num_bytes

    def on_draft_changed(self, workload: str | None = None) -> None:
        """Begin again with a workload (None: with all), collecting until initialised: its figures were another draft's."""
        if workload is None:
            self._watches = {}
        else:
            self._watches.pop(workload, None)

    def state(self) -> dict[str, int | float | bool]:
        """Flat figures for stats: `collecting.<workload>`, `ema_short.<workload>`, ..."""
        out: dict[str, int | float | bool] = {"collected_bytes_this_hour": self._spent_bytes}
        for name, watch in self._watches.copy().items():
            out |= {f"collecting.{name}": self._settings.mode == "on" or (self._settings.mode == "auto" and watch.collecting),
                    f"ema_short.{name}": watch.emas.short, f"ema_long.{name}": watch.emas.long, f"ema_best.{name}": watch.best,
                    f"observed_requests.{name}": watch.emas.seen}
        return out

    def _watch(self, workload: str) -> _Watch:
        s = self._settings
        watch = self._watches.pop(workload, None) or _Watch(PageHinkley(s.change_delta, s.change_threshold), Emas(s))
        self._watches[workload] = watch            # most recently seen last
        if len(self._watches) > MAX_WORKLOADS:
            del self._watches[next(iter(self._watches))]
        return watch

    def _roll(self, now: float) -> None:
        hour = int(now // 3600)
        if hour != self._hour:
            self._hour, self._spent_bytes = hour, 0
