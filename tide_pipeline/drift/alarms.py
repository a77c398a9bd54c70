"""Rules that compare acceptance with what it was shortly before: the paper's two averages, and change-point tests. Pure.

Values are slots, or as many together as hold VALUE_STEPS drafted steps: where the speculation controller leaves but a few probes to
a slot, its rate says next to nothing. An alarm, which tests give once, stands until acceptance is back where it was before.
"""

from __future__ import annotations

import time
from typing import Protocol

from tide_pipeline.capture.change import PageHinkley
from tide_pipeline.capture.emas import Emas
from tide_pipeline.config import CaptureSettings
from tide_pipeline.drift.adwin import Adwin
from tide_pipeline.drift.slots import Slot, Sums

VALUE_STEPS = 50
KEEP = 0.9                         # of the average that tells when an alarm is over


class Test(Protocol):
    """Of one value after another."""

    says: str                      # with the numbers: of the last alarm, or of the values so far

    def update(self, value: float) -> float | None:
        """Where the values were before they fell; None: they did not fall now."""
        ...


class Alarm:
    """A test as a rule. Its alarm is over when the average is back within `margin` of where it was before."""

    def __init__(self, test: Test, margin: float) -> None:
        self._test, self._margin = test, margin
        self._gathered, self._level = Sums(), -1.0
        self._before: float | None = None
        self._evidence = ""

    @property
    def fires(self) -> bool:
        return self._before is not None

    def take(self, slot: Slot) -> None:
        self._gathered.add(slot)
        if self._gathered.drafted >= VALUE_STEPS:
            self._take(self._gathered.rate, slot.time)
            self._gathered = Sums()

    @property
    def says(self) -> str:
        if self._before is None:
            return f"no alarm: {self._test.says}"
        return f"{self._evidence}, now {self._level:.2f}"

    def _take(self, value: float, at: float) -> None:
        self._level = value if self._level < 0 else KEEP * self._level + (1 - KEEP) * value
        before = self._test.update(value)
        if before is not None and self._before is None:
            self._before = before
            self._evidence = f"alarm of {time.strftime('%H:%M:%S', time.gmtime(at))} UTC: {self._test.says}"
        elif before is None and self._before is not None and self._level >= self._before - self._margin:
            self._before = None


class Averages:
    """Algorithm 1: the short average below the long one by `epsilon`. Silent while they begin: they are equal then."""

    def __init__(self, settings: CaptureSettings) -> None:
        self._epsilon, self._emas = settings.epsilon, Emas(settings)
        self.says = "no averages yet"

    def update(self, value: float) -> float | None:
        emas = self._emas
        emas.update(value)
        has_parted = emas.short < emas.long - self._epsilon
        self.says = f"short average {emas.short:.2f} {'<' if has_parted else '>='} long {emas.long:.2f} - {self._epsilon:.2f}"
        return emas.long if has_parted else None


class ChangePoint:
    """A test of its own mind; `before` is the mean since it began, or since its last alarm."""

    def __init__(self, name: str, test: PageHinkley | Adwin) -> None:
        self._name, self._test = name, test
        self._count, self._mean = 0, 0.0
        self.says = "no values yet"

    def update(self, value: float) -> float | None:
        self._count += 1
        self._mean += (value - self._mean) / self._count
        self.says = f"{self._name} sees no fall in {self._count} values of mean {self._mean:.2f}"
        if not self._test.update(value):
            return None
        self.says = f"{self._name} finds a fall after {self._count} values of mean {self._mean:.2f}"
        before, self._count, self._mean = self._mean, 0, 0.0
        return before
