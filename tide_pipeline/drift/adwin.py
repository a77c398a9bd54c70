"""ADWIN: a window that forgets what no longer fits (Bifet and Gavaldà, SDM 2007). Pure: numbers in, alarms out.

The window lies in buckets of 1, 2, 4, ... values, MOST of each size, so n values take O(log n) memory. Every CLOCK values each border
between buckets is tried as a cut: older mean - newer mean is too large to be chance with confidence 1 - delta when it exceeds
    eps = sqrt(2 / m * variance * ln(2 / d')) + 2 / (3 m) * ln(2 / d'),      1 / m = 1 / n_old + 1 / n_new,   d' = delta / ln(n)
and then the oldest bucket goes. Here only a fall is an alarm; a rise shortens the window in silence.
"""

from __future__ import annotations

import math

MOST = 5                           # buckets of a size
CLOCK, GRACE = 8, 8                # values between two looks; values that each side of a cut needs at least


class Adwin:
    """`update` tells whether the mean has dropped."""

    def __init__(self, delta: float = 0.002) -> None:
        self._delta = delta
        self._rows: list[list[tuple[float, float]]] = [[]]     # row k: (sum, sum of squares) of buckets of 2^k values, oldest first
        self._count, self._sum, self._squares, self._ticks = 0, 0.0, 0.0, 0

    @property
    def width(self) -> int:
        """Values in the window."""
        return self._count

    @property
    def mean(self) -> float:
        return self._sum / self._count if self._count else 0.0

    def update(self, value: float) -> bool:
        self._rows[0].append((value, value * value))
        self._count, self._sum, self._squares = self._count + 1, self._sum + value, self._squares + value * value
        self._merge()
        self._ticks += 1
        return self._ticks % CLOCK == 0 and self._shrink()

    def _merge(self) -> None:
        k = 0
        while len(self._rows[k]) > MOST:
            if k + 1 == len(self._rows):
                self._rows.append([])
            (a, aa), (b, bb) = self._rows[k][:2]
            del self._rows[k][:2]
            self._rows[k + 1].append((a + b, aa + bb))
            k += 1

    def _shrink(self) -> bool:
        has_fallen = False
        while (change := self._cut()) is not None:
            has_fallen |= change < 0
            self._drop_oldest()
        return has_fallen

    def _cut(self) -> float | None:
        """Newer mean - older mean at the first border where they differ too much; None where nowhere."""
        if self._count < 2 * GRACE:
            return None
        variance = max(0.0, self._squares / self._count - self.mean**2)
        strictness = math.log(2 * math.log(self._count) / self._delta)
        old_n, old_sum = 0, 0.0
        for k in range(len(self._rows) - 1, -1, -1):
            for total, _ in self._rows[k]:
                old_n, old_sum = old_n + (1 << k), old_sum + total
                new_n = self._count - old_n
                if new_n < GRACE:
                    return None
                if old_n >= GRACE:
                    per = 1 / old_n + 1 / new_n
                    change = (self._sum - old_sum) / new_n - old_sum / old_n
                    if abs(change) > math.sqrt(2 * per * variance * strictness) + 2 / 3 * per * strictness:
                        return change
        return None

    def _drop_oldest(self) -> None:
        total, squares = self._rows[-1].pop(0)
        self._count, self._sum, self._squares = self._count - (1 << len(self._rows) - 1), self._sum - total, self._squares - squares
        while len(self._rows) > 1 and not self._rows[-1]:
            self._rows.pop()
