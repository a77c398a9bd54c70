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
        self.drop, self.low, self.high = 0.0, -1.0, 1.0

    def update(self, slot: Slot) -> bool:
        s = self.settings
        self._count(slot, 1)
        self._slots.append(slot)
        while self._is_old(self._slots[0], slot.time):
            self._count(self._slots.popleft(), -1)
        if self.drafted < s.min_steps or self.requests < MIN_REQUESTS:
            self.drop, self.low, self.high = 0.0, -1.0, 1.0
            return False
        recent = weighted(self._slots, min(slot.time - s.recent_s, self._slots[0].time), slot.time)
        self.drop, self.low, self.high = drop_interval(recent, self.baseline)
        return self.low >= s.min_drop

    @property
    def says(self) -> str:
        sign = ">=" if self.low >= self.settings.min_drop else "<"
        return f"drop {self.drop:.2f} ({self.low:.2f} to {self.high:.2f}): lower end {sign} {self.settings.min_drop:.2f}"

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

    def update(self, slot: Slot) -> bool:
        fallen, alarmed = self._judge.update(slot), self._alarm.update(slot)
        return fallen or (alarmed and self._bears_out)

    @property
    def _bears_out(self) -> bool:
        return self._judge.low > 0 and self._judge.drop >= LEAST_DROP

    @property
    def says(self) -> str:
        judge = self._judge
        if not self._alarm.is_raised or judge.low >= judge.settings.min_drop:
            return f"{judge.says}; {self._alarm.says}"
        is_borne_out = "a real drop" if self._bears_out else f"not borne out yet, needs a lower end > 0 and a drop >= {LEAST_DROP:.2f}"
        return f"{self._alarm.says}; {is_borne_out}: {judge.drop:.2f} ({judge.low:.2f} to {judge.high:.2f})"


class LevelEma:
    """One EMA against the acceptance at promotion."""

    def __init__(self, baseline: RateEstimate, epsilon: float = 0.10, keep: float = 0.9) -> None:
        self._level, self._epsilon, self._keep = baseline.rate, epsilon, keep
        self._ema = -1.0

    def update(self, slot: Slot) -> bool:
        if slot.drafted:
            self._ema = slot.rate if self._ema < 0 else self._keep * self._ema + (1 - self._keep) * slot.rate
        return 0 <= self._ema < self._level - self._epsilon

    @property
    def says(self) -> str:
        sign = "<" if self._ema < self._level - self._epsilon else ">="
        return f"average {self._ema:.2f} {sign} {self._level:.2f} at promotion - {self._epsilon:.2f}"
