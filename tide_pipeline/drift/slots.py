"""A few seconds of traffic as sums, and sums of those with the estimate of rates.py. Pure: knows no log and no rule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tide_pipeline.drift.rates import RateEstimate, clustered

SLICES = 4                         # of a window of time, each weighted by its traffic


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
    steps: int = 0                 # all, drafted or not; 0: as many as drafted

    @property
    def rate(self) -> float:
        return self.accepted / self.drafted


class Sums:
    """Slots added up."""

    __slots__ = ("_aa", "_da", "_dd", "accepted", "drafted", "requests", "steps")

    def __init__(self) -> None:
        self.requests = self.drafted = self.accepted = self.steps = 0
        self._dd = self._da = self._aa = 0.0

    def add(self, slot: Slot) -> None:
        self.requests += slot.requests
        self.drafted += slot.drafted
        self.accepted += slot.accepted
        self.steps += slot.steps or slot.drafted
        self._dd += slot.dd
        self._da += slot.da
        self._aa += slot.aa

    @property
    def rate(self) -> float:
        return self.accepted / self.drafted

    @property
    def squares(self) -> float:
        """sum(u_i^2) of rates.py."""
        return max(0.0, self._aa - 2 * self.rate * self._da + self.rate**2 * self._dd) / self.drafted**2

    @property
    def floor(self) -> float:
        """The variance if every step were independent."""
        smooth = (self.accepted + 1) / (self.drafted + 2)
        return smooth * (1 - smooth) / self.drafted

    def estimate(self) -> RateEstimate:
        """Every drafted step counts as much as any other; there must be one."""
        return clustered(self.rate, self.drafted, self.requests, 1, self.squares, self.floor)


def weighted(slots: Iterable[Slot], begin: float, end: float) -> RateEstimate:
    """As acceptance.py does it in SQL: slices of time between `begin` and `end` count by their traffic, not by their drafted steps."""
    slices, scale = [Sums() for _ in range(SLICES)], SLICES / (end - begin)
    for slot in slots:
        slices[min(SLICES - 1, int((slot.time - begin) * scale))].add(slot)
    used = [sums for sums in slices if sums.drafted]
    steps = sum(sums.steps for sums in used)
    rate = squares = floor = 0.0
    for sums in used:
        weight = sums.steps / steps
        rate += weight * sums.rate
        squares += weight**2 * sums.squares
        floor += weight**2 * sums.floor
    return clustered(rate, sum(sums.drafted for sums in used), sum(sums.requests for sums in used), len(used), squares, floor)
