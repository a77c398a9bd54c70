"""A change-point test for falling acceptance: Page-Hinkley. Pure.

With m the mean of all values so far, S_t = alpha S_(t-1) + (x_t - m_t + delta) rises while values stay where they were and falls once
they drop by more than delta; the alarm is given when S_t lies `threshold` below its highest value. Source: Page (1954); the recursion
with alpha is that of the `river` library, whose decisions tests/golden/page_hinkley.json holds.
"""

from __future__ import annotations


class PageHinkley:
    """`update` tells whether the mean has dropped. After an alarm it begins anew."""

    def __init__(self, delta: float, threshold: float, *, min_values: int = 30, alpha: float = 0.9999) -> None:
        self._delta, self._threshold, self._min_values, self._alpha = delta, threshold, min_values, alpha
        self._begin()

    def _begin(self) -> None:
        self._count = 0
        self._mean, self._sum, self._highest = 0.0, 0.0, float("-inf")

    def update(self, value: float) -> bool:
        self._count += 1
        self._mean += (value - self._mean) / self._count
        self._sum = self._alpha * self._sum + (value - self._mean + self._delta)
        self._highest = max(self._highest, self._sum)
        alarm = self._count >= self._min_values and self._highest - self._sum > self._threshold
        if alarm:
            self._begin()
        return alarm
