"""First-position acceptance with its uncertainty, and the interval of a drop. Pure: numbers in, numbers out.

Steps of one request resemble each other, so requests, not steps, are the independent observations. With d_i drafted and a_i accepted
first tokens of request i, the rate is a ratio of sums, and linearising it gives the cluster-robust variance:
    r = sum(a_i) / sum(d_i)          var(r) = m / (m - S) * sum(u_i^2),   u_i = (a_i - r d_i) / sum(d_i)
A sample may be cut into S slices of time, weighted by the traffic in them rather than by drafted steps: r = sum(w_s r_s), and u_i is
added up over slices. Otherwise the speculation controller, which drafts a lot where drafts are good, would decide what is seen.
The normal approximation (Student's t, Welch's degrees of freedom) rather than a bootstrap: sums are all that it needs, so they can be
made where the rows are, and the same log gives the same verdict.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Z975 = 1.959964                    # standard normal, 97.5 %


@dataclass(frozen=True, slots=True)
class RateEstimate:
    """A first-position rate and what is known about its error."""

    rate: float
    variance: float                # of the rate, requests being the clusters
    freedom: float                 # degrees of freedom of that variance
    steps: int                     # drafted steps
    requests: int                  # that drafted


def clustered(rate: float, steps: int, requests: int, slices: int, squares: float, floor: float) -> RateEstimate:
    """An estimate from sums: `squares` = sum(u_i^2), `floor` = the variance if every step were independent, the least there can be."""
    freedom = requests - slices
    variance = squares * requests / freedom if freedom > 0 else math.inf
    return RateEstimate(rate, max(variance, floor), freedom, steps, requests)


def drop_interval(recent: RateEstimate, baseline: RateEstimate) -> tuple[float, float, float]:
    """baseline - recent, and the ends of its 95 % interval."""
    drop, variance = baseline.rate - recent.rate, baseline.variance + recent.variance
    if not math.isfinite(variance):
        return drop, -1.0, 1.0
    half = student_975(_welch(recent, baseline)) * math.sqrt(variance)
    return drop, max(-1.0, drop - half), min(1.0, drop + half)


def student_975(freedom: float) -> float:
    """97.5 % quantile of Student's t (Cornish-Fisher expansion, within 1 % from 3 degrees on)."""
    z, n = Z975, max(freedom, 1.0)
    return (z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
            + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3))


def _welch(a: RateEstimate, b: RateEstimate) -> float:
    """Degrees of freedom of the difference."""
    parts = sum(e.variance**2 / e.freedom for e in (a, b))
    return (a.variance + b.variance) ** 2 / parts if parts > 0 else math.inf
