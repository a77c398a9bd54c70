"""Rules that compare with the acceptance at promotion, over slots of traffic. Pure.

A rule sees one workload on one draft version, whose acceptance at promotion is known: `baseline`.
"""

from __future__ import annotations

from collections import deque

from tide_pipeline.config import DriftSettings
from tide_pipeline.drift.acceptance import MIN_REQUESTS, REACH
from tide_pipeline.drift.alarms import Alarm
from tide_pipeline.drift.rates import RateEstimate, drop_interval
from tide_pipeline.drift.slots import Slot, weighted

LEAST_DROP = 0.04                  # that an alarm is acted on: below it, wandering by itself and the baseline's error are most of it


class Judge:
    """judge.py over slots: recent are the last `recent_s`, or as far back as it needs to go. Drifted when the whole interval is large."""

    def __init__(self, settings: DriftSettings, baseline: RateEstimate) -> None:
        self.settings, self.baseline = settings, baseline
        self.drafted = self.requests = 0           # in the window
        self._slots: deque[Slot] = deque()
        self._drop: tuple[float, float, float] | None = None

    def take(self, slot: Slot) -> None:
        self._drop = None
        self._count(slot, 1)
        self._slots.append(slot)
        while self._is_old(self._slots[0], slot.time):
            self._count(self._slots.popleft(), -1)

    @property
    def drop(self) -> tuple[float, float, float]:
        """And its interval; too little data is (0, -1, 1). Asked for, it is worked out: most slots are not asked about."""
        if self._drop is None:
            self._drop = self._compare()
        return self._drop

    @property
    def fires(self) -> bool:
        return self.drop[1] >= self.settings.min_drop

    @property
    def says(self) -> str:
        drop, low, high = self.drop
        return f"drop {drop:.2f} ({low:.2f} to {high:.2f}): lower end {'>=' if self.fires else '<'} {self.settings.min_drop:.2f}"

    def _compare(self) -> tuple[float, float, float]:
        s = self.settings
        if self.drafted < s.min_steps or self.requests < MIN_REQUESTS:
            return 0.0, -1.0, 1.0
        now = self._slots[-1].time
        return drop_interval(weighted(self._slots, min(now - s.recent_s, self._slots[0].time), now), self.baseline)

    def _count(self, slot: Slot, sign: int) -> None:
        self.drafted += sign * slot.drafted
        self.requests += sign * slot.requests

    def _is_old(self, slot: Slot, now: float) -> bool:
        age, needed = now - slot.time, self.drafted - slot.drafted < self.settings.min_steps
        return age >= REACH * self.settings.recent_s or (age >= self.settings.recent_s and not needed)


class JudgeAnd:
    """Judge, or an alarm once the interval bears it out: the drop from the promotion is real, be it smaller than `min_drop`."""

    def __init__(self, judge: Judge, alarm: Alarm) -> None:
        self._judge, self._alarm = judge, alarm

    def take(self, slot: Slot) -> None:
        self._judge.take(slot)
        self._alarm.take(slot)

    @property
    def fires(self) -> bool:
        return self._judge.fires or (self._alarm.fires and self._bears_out)

    @property
    def _bears_out(self) -> bool:
        drop, low, _ = self._judge.drop
        return low > 0 and drop >= LEAST_DROP

    @property
    def says(self) -> str:
        if self._judge.fires or not self._alarm.fires:
            return f"{self._judge.says}; {self._alarm.says}"
        drop, low, high = self._judge.drop
        is_borne_out = "a real drop" if self._bears_out else f"not borne out yet, needs a lower end > 0 and a drop >= {LEAST_DROP:.2f}"
        return f"{self._alarm.says}; {is_borne_out}: {drop:.2f} ({low:.2f} to {high:.2f})"


class LevelEma:
    """One EMA against the acceptance at promotion."""

    def __init__(self, baseline: RateEstimate, epsilon: float = 0.10, keep: float = 0.9) -> None:
        self._level, self._epsilon, self._keep = baseline.rate, epsilon, keep
        self._ema = -1.0

    def take(self, slot: Slot) -> None:
        if slot.drafted:
            self._ema = slot.rate if self._ema < 0 else self._keep * self._ema + (1 - self._keep) * slot.rate

    @property
    def fires(self) -> bool:
        return 0 <= self._ema < self._level - self._epsilon

    @property
    def says(self) -> str:
        return f"average {self._ema:.2f} {'<' if self.fires else '>='} {self._level:.2f} at promotion - {self._epsilon:.2f}"
