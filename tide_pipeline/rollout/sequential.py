"""An interval that holds at every look. Pure arithmetic: knows neither drafts nor replicas.

Whoever looks at an ordinary 95 % interval again and again until it says what he waits for is wrong far more often than 1 time in 20.
The interval here, Robbins' mixture of normals (the mixture sequential probability ratio test turned round), covers the true difference
at all looks at once: stop whenever you like, the error stays below `alpha`.

    estimate +- sqrt( e^2 (1 + e^2 / s^2) (2 log(1/alpha) + log(1 + s^2 / e^2)) )       e its standard error, s = `scale`

It needs what differences of two growing samples have: the covariance of an earlier and a later estimate is the later one's variance.
With standard errors estimated from the same data the bound is asymptotic; tests/unit/test_rollout_sequential.py simulates how far that
is from the truth at the sizes used here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FALSE_ROLLBACKS = 0.05             # of rollouts whose draft is no worse, over the whole rollout and all metrics
METRICS = 3                        # acceptance, time per token, errors: each gets its share
ALPHA = 2 * FALSE_ROLLBACKS / METRICS      # two-sided, as only the upper side rolls back


@dataclass(frozen=True, slots=True)
class Gap:
    """How much worse the new draft is in one metric (positive is worse), and the standard error of that."""

    value: float
    error: float
    n: int                         # what the error was counted over

    def interval(self, scale: float, alpha: float = ALPHA) -> tuple[float, float]:
        """Low and high end, valid at every look."""
        width = half_width(self.error, scale, alpha)
        return self.value - width, self.value + width


def half_width(error: float, scale: float, alpha: float = ALPHA) -> float:
    """`scale` is the size of difference at which it is to be sharp; any is valid."""
    ratio = (error / scale) ** 2
    if ratio == 0.0:
        return 0.0
    return error * math.sqrt((1 + ratio) * (2 * math.log(1 / alpha) + math.log1p(1 / ratio)))
