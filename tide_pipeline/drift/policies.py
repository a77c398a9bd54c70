"""The table of rules that can watch acceptance: `drift.policy` names the one that the sensor follows, the backtest replays any. Pure.

    judge          ours: the whole 95 % interval of the drop from the acceptance at promotion lies at or above `min_drop`
    judge+paper    the same, or the paper's alarm once the interval excludes that nothing fell: smaller falls, seen sooner
    judge+change   the same with Page-Hinkley's alarm
    ema            plain EMA of first-position acceptance below the acceptance at promotion by 0.10
    paper          Algorithm 1: the short EMA below the long one by `capture.epsilon`
    page_hinkley, adwin       change-point tests alone

A rule remembers at least one hour and at most two: `Running` lets it begin anew at the whole hour, on what came since the hour before.
So whoever reads that much of the log has the rule as it would be, had it run all the time: a sensor that was just started too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from tide_pipeline.capture.change import PageHinkley
from tide_pipeline.config import CaptureSettings, DriftSettings
from tide_pipeline.drift.adwin import Adwin
from tide_pipeline.drift.alarms import Alarm, Averages, ChangePoint
from tide_pipeline.drift.early import TIMES, baseline_steps, is_settled
from tide_pipeline.drift.level import Judge, JudgeAnd, LevelEma
from tide_pipeline.drift.rates import RateEstimate
from tide_pipeline.drift.slots import Slot, Sums

HOUR_S = 3600.0


class Rule(Protocol):
    """Decides for one workload on one draft version, whose acceptance at promotion is known."""

    def take(self, slot: Slot) -> None:
        """The next one."""
        ...

    @property
    def fires(self) -> bool:
        """Whether to adapt now; goes on saying so while it holds."""
        ...

    @property
    def says(self) -> str:
        """Why, or why not, with the numbers."""
        ...


def _paper(capture: CaptureSettings) -> Alarm:
    return Alarm(Averages(capture), capture.epsilon / 2)


def _page_hinkley(capture: CaptureSettings) -> Alarm:
    test = PageHinkley(capture.change_delta, capture.change_threshold)
    return Alarm(ChangePoint("Page-Hinkley", test), capture.change_delta / 2)


POLICIES: dict[str, Callable[[DriftSettings, CaptureSettings, RateEstimate], Rule]] = {
    "judge": lambda drift, _, baseline: Judge(drift, baseline),
    "judge+paper": lambda drift, capture, baseline: JudgeAnd(Judge(drift, baseline), _paper(capture)),
    "judge+change": lambda drift, capture, baseline: JudgeAnd(Judge(drift, baseline), _page_hinkley(capture)),
    "ema": lambda _d, _c, baseline: LevelEma(baseline),
    "paper": lambda _d, capture, _b: _paper(capture),
    "page_hinkley": lambda _d, capture, _b: _page_hinkley(capture),
    "adwin": lambda _d, capture, _b: Alarm(ChangePoint("ADWIN", Adwin(0.002)), capture.change_delta / 2),
}


def remembers_since(time: float) -> float:
    """Slots that ended later than this are what a rule goes by at `time`."""
    return (math.ceil(time / HOUR_S) - 2) * HOUR_S


class Running:
    """A policy over a life of any length. Without a `baseline` the first slots are taken for it."""

    def __init__(self, name: str, drift: DriftSettings, capture: CaptureSettings, baseline: RateEstimate | None = None) -> None:
        self._make, self._drift, self._capture = POLICIES[name], drift, capture
        self._baseline, self._first = baseline, Sums()
        self._since = -math.inf
        self._now: Rule | None = None
        self._next: Rule | None = None

    def update(self, slot: Slot) -> bool:
        """Whether to adapt now."""
        if self._baseline is None:
            self._calibrate(slot)
            return False
        if self._now is None or self._next is None or remembers_since(slot.time) != self._since:
            self._hand_over(remembers_since(slot.time), self._baseline)
        assert self._now is not None and self._next is not None
        self._next.take(slot)
        self._now.take(slot)
        return self._now.fires

    @property
    def says(self) -> str:
        return self._now.says if self._now is not None else "no baseline yet"

    def _hand_over(self, since: float, baseline: RateEstimate) -> None:
        fresh = self._make(self._drift, self._capture, baseline)
        self._now = self._next if self._next is not None and since == self._since + HOUR_S else fresh
        self._next, self._since = self._make(self._drift, self._capture, baseline), since

    def _calibrate(self, slot: Slot) -> None:
        self._first.add(slot)
        if not self._first.drafted:                        # probes are rare where drafts are off
            return
        estimate, steps = self._first.estimate(), baseline_steps(self._drift)
        if any(is_settled(estimate, steps, times) for times in TIMES):
            self._baseline = estimate
