"""A histogram as Prometheus counts it, kept on this side of Triton. Knows no metric's name.

Triton has a HISTOGRAM kind, but each observation is a call into the server; these are counted here and published once a second.
"""

from __future__ import annotations

import bisect
import threading
from dataclasses import dataclass

BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True, slots=True)
class Reading:
    """Running totals. `at_most[le]` counts observations of at most `le`; the last key is "+Inf"."""

    at_most: dict[str, int]
    total: float
    count: int


class Histogram:
    """May be used from any thread."""

    def __init__(self, bounds: tuple[float, ...] = BOUNDS_S) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float, times: int = 1) -> None:
        with self._lock:
            self._counts[bisect.bisect_left(self._bounds, value)] += times
            self._total += value * times

    def read(self) -> Reading:
        with self._lock:
            counts, total = list(self._counts), self._total
        at_most, so_far = {}, 0
        for bound, count in zip([*(f"{bound:g}" for bound in self._bounds), "+Inf"], counts, strict=True):
            so_far += count
            at_most[bound] = so_far
        return Reading(at_most, total, so_far)
