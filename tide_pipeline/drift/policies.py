"""Rules that could watch acceptance, behind one face: a Slot of traffic in, whether to adapt now out. Pure; judge.py is what runs.

    judge          ours: the whole 95 % interval of the drop from the acceptance at promotion lies at or above `min_drop`
    judge+paper    the same, or the paper's alarm once the interval excludes that nothing fell: smaller falls, seen sooner
    ema            plain EMA of first-position acceptance below the acceptance at promotion by `epsilon`
    paper          Algorithm 1: the short EMA below the long one by `epsilon`
    page_hinkley, adwin       change-point tests alone, a value per slot

A policy sees one workload on one draft version.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tide_pipeline.capture.change import PageHinkley
from tide_pipeline.capture.emas import Emas
from tide_pipeline.config import CaptureSettings, DriftSettings
from tide_pipeline.drift.acceptance import MIN_REQUESTS, REACH
from tide_pipeline.drift.adwin import Adwin
from tide_pipeline.drift.early import baseline_steps
from tide_pipeline.drift.rates import RateEstimate, clustered, drop_interval


@dataclass(frozen=True, slots=True)
class Slot:
    """What requests that ended in a few seconds said of first-position acceptance: sums that add up, d drafted and a accepted of each."""

    time: float                    # end of the slot, Unix seconds
    requests: int                  # that drafted
    drafted: int                   # sum(d)
    accepted: int                  # sum(a)
    dd: float                      # sum(d * d)
    da: float                      # sum(d * a)
    aa: float                      # sum(a * a)
    tokens: int = 0                # emitted
    steps: int = 0                 # all, drafted or not

    @property
    def rate(self) -> float:
        return self.accepted / self.drafted


class Policy(Protocol):
    """Decides for one workload on one draft version."""

    def update(self, slot: Slot) -> bool:
        """Whether to adapt now; goes on saying so while it holds, where the rule looks at a level."""
        ...


class Sums:
    """Slots added up, with the estimate of rates.py; slots can be taken out again."""

    def __init__(self) -> None:
        self.requests = self.drafted = self.accepted = 0
        self._dd = self._da = self._aa = 0.0

    def add(self, slot: Slot, sign: int = 1) -> None:
        self.requests += sign * slot.requests
        self.drafted += sign * slot.drafted
        self.accepted += sign * slot.accepted
        self._dd, self._da, self._aa = self._dd + sign * slot.dd, self._da + sign * slot.da, self._aa + sign * slot.aa

    def estimate(self) -> RateEstimate:
        d = max(self.drafted, 1)
        rate, smooth = self.accepted / d, (self.accepted + 1) / (self.drafted + 2)
        squares = max(0.0, self._aa - 2 * rate * self._da + rate * rate * self._dd) / d**2
        return clustered(rate, self.drafted, self.requests, 1, squares, smooth * (1 - smooth) / d)


class Judge:
    """judge.py over slots: the baseline is the draft's first steps, recent are the last `recent_s`, or as far back as it needs to go."""

    def __init__(self, settings: DriftSettings) -> None:
        self.settings = settings
        self.baseline, self.recent = Sums(), Sums()
        self._slots: deque[Slot] = deque()
        self.drop, self.low, self.high = 0.0, -1.0, 1.0

    @property
    def is_calibrated(self) -> bool:
        return self.baseline.drafted >= baseline_steps(self.settings) and self.baseline.requests >= MIN_REQUESTS

    def update(self, slot: Slot) -> bool:
        s = self.settings
        if not self.is_calibrated:
            self.baseline.add(slot)
            return False
        self._slots.append(slot)
        self.recent.add(slot)
        while self._slots and self._is_old(self._slots[0], slot.time):
            self.recent.add(self._slots.popleft(), -1)
        if self.recent.drafted < s.min_steps or self.recent.requests < MIN_REQUESTS:
            self.drop, self.low, self.high = 0.0, -1.0, 1.0
            return False
        self.drop, self.low, self.high = drop_interval(self.recent.estimate(), self.baseline.estimate())
        return self.low >= s.min_drop

    def _is_old(self, slot: Slot, now: float) -> bool:
        age, needed = now - slot.time, self.recent.drafted - slot.drafted < self.settings.min_steps
        return age >= REACH * self.settings.recent_s or (age >= self.settings.recent_s and not needed)


class JudgeAndPaper:
    """Judge, or the paper's alarm once the interval bears it out: the drop from the promotion is real, be it smaller than `min_drop`."""

    def __init__(self, drift: DriftSettings, capture: CaptureSettings, least: float = 0.04) -> None:
        self.judge, self._paper, self._least = Judge(drift), Paper(capture), least
        self._alarmed = False

    def update(self, slot: Slot) -> bool:
        fallen, parted = self.judge.update(slot), self._paper.update(slot)
        self._alarmed = parted or (self._alarmed and self.judge.drop > self._least / 2)     # else it came back
        return fallen or (self._alarmed and self.judge.low > 0 and self.judge.drop >= self._least)


class LevelEma:
    """One EMA against the acceptance at promotion."""

    def __init__(self, settings: DriftSettings, epsilon: float = 0.10, keep: float = 0.9) -> None:
        self._settings, self._epsilon, self._keep = settings, epsilon, keep
        self._baseline, self._ema = Sums(), -1.0

    def update(self, slot: Slot) -> bool:
        if self._baseline.drafted < baseline_steps(self._settings):
            self._baseline.add(slot)
            return False
        self._ema = slot.rate if self._ema < 0 else self._keep * self._ema + (1 - self._keep) * slot.rate
        return self._ema < self._baseline.accepted / self._baseline.drafted - self._epsilon


class Paper:
    """Algorithm 1 over slots: silent until the EMAs have begun."""

    def __init__(self, settings: CaptureSettings) -> None:
        self._epsilon, self._emas = settings.epsilon, Emas(settings)

    def update(self, slot: Slot) -> bool:
        self._emas.update(slot.rate)
        return self._emas.short < self._emas.long - self._epsilon      # they are equal while they begin


class Alarm:
    """A change-point test of slot rates as a policy: it speaks once a change."""

    def __init__(self, test: PageHinkley | Adwin) -> None:
        self._test = test

    def update(self, slot: Slot) -> bool:
        return self._test.update(slot.rate)


POLICIES: dict[str, Callable[[DriftSettings, CaptureSettings], Policy]] = {
    "judge": lambda drift, _: Judge(drift),
    "judge+paper": JudgeAndPaper,
    "ema": lambda drift, _: LevelEma(drift),
    "paper": lambda _, capture: Paper(capture),
    "page_hinkley": lambda _, capture: Alarm(PageHinkley(capture.change_delta, capture.change_threshold)),
    "adwin": lambda _d, _c: Alarm(Adwin(0.002)),
}
