"""The interval that holds at every look, simulated: how often it is wrong when somebody looks after every request, and what it finds.

Requests differ (beta-binomial, sixteen drafted steps each), both sides grow together, and the standard errors are the estimator's own.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from tide_pipeline.config import RolloutSettings
from tide_pipeline.rollout.bake import scale_of
from tide_pipeline.rollout.live import Rate, Side
from tide_pipeline.rollout.rows import LiveRow
from tide_pipeline.rollout.sequential import ALPHA, FALSE_ROLLBACKS, METRICS, Gap, half_width

STEPS = 16                         # drafted steps of a request
ROLLOUTS, REQUESTS = 2_000, 120    # on each side
SETTINGS = RolloutSettings()
Array = NDArray[np.float64]


def accepted(seed: int, rate: float, alike: float) -> Array:
    """[rollout, request] accepted first tokens; `alike` (concentration) small: requests differ much, inf: not at all."""
    rng = np.random.default_rng(seed)
    shape = (ROLLOUTS, REQUESTS)
    rates = np.full(shape, rate) if math.isinf(alike) else rng.beta(rate * alike, (1 - rate) * alike, shape)
    return rng.binomial(STEPS, rates).astype(float)


def looks(counts: Array) -> tuple[Array, Array]:
    """Rate and standard error after each request, as live.Side computes them."""
    n = np.arange(1, REQUESTS + 1)
    steps, total = STEPS * n, counts.cumsum(axis=1)
    rate = total / steps
    spread = (np.square(counts).cumsum(axis=1) - n * np.square(rate * STEPS)) * n / np.maximum(n - 1, 1) / np.square(steps)
    smoothed = (total + 1) / (steps + 2)
    return rate, np.sqrt(np.maximum(spread, smoothed * (1 - smoothed) / steps))


def lower_ends(old: Array, new: Array, alpha: float) -> Array:
    """Of the drop, at every look from `min_bake_requests` on."""
    (a, a_error), (b, b_error) = looks(old), looks(new)
    error, scale = np.hypot(a_error, b_error), scale_of(SETTINGS.max_drop)
    ratio = np.square(error / scale)
    width = error * np.sqrt((1 + ratio) * (2 * math.log(1 / alpha) + np.log1p(1 / ratio)))
    return (a - b - width)[:, SETTINGS.min_bake_requests - 1:]


def rate_of(counts: Array) -> Rate:
    side = Side()
    for i, count in enumerate(counts):
        side.add(LiveRow(0.0, str(i), "de", "a", "v1", STEPS, int(count), finish_reason="stop"))
    return side.rate()


def test_the_simulation_computes_what_the_rollout_does() -> None:
    counts, old = accepted(1, 0.6, 6.0)[:1], accepted(2, 0.5, 6.0)[:1]
    rate, error = looks(counts)
    for n in (8, 40, REQUESTS):
        found = rate_of(counts[0, :n])
        assert (rate[0, n - 1], error[0, n - 1]) == pytest.approx((found.rate, found.error))
    was, its = rate_of(old[0]), rate_of(counts[0])
    low, _ = Gap(was.rate - its.rate, math.hypot(was.error, its.error), REQUESTS).interval(scale_of(SETTINGS.max_drop))
    assert lower_ends(old, counts, ALPHA)[0, -1] == pytest.approx(low)


@pytest.mark.parametrize("rate", [0.5, 0.85])
@pytest.mark.parametrize("alike", [3.0, 12.0, math.inf])
def test_no_difference_is_rarely_called_worse_at_any_look(rate: float, alike: float) -> None:
    """Acceptance has a third of the 5 %; a drop that is allowed (0.10) would need far more than "certainly some"."""
    ends = lower_ends(accepted(3, rate, alike), accepted(4, rate, alike), ALPHA)
    assert (ends > 0).any(axis=1).mean() <= FALSE_ROLLBACKS / METRICS
    assert (ends > SETTINGS.max_drop).any(axis=1).mean() <= 0.002


def test_an_ordinary_interval_would_not_hold() -> None:
    """Why this is needed: the fixed 95 % interval, looked at after every request, is wrong several times as often."""
    (a, a_error), (b, b_error) = looks(accepted(3, 0.5, 12.0)), looks(accepted(4, 0.5, 12.0))
    ordinary = (a - b - 1.96 * np.hypot(a_error, b_error))[:, SETTINGS.min_bake_requests - 1:]
    assert (ordinary > 0).any(axis=1).mean() > 3 * 0.025


@pytest.mark.parametrize(("loss", "requests", "power"), [(0.2, 120, 0.80), (0.3, 60, 0.95), (0.4, 30, 0.95)])
def test_a_real_loss_is_found(loss: float, requests: int, power: float) -> None:
    """`loss` of first-position acceptance, where 0.10 is allowed, by this many requests on each side."""
    ends = lower_ends(accepted(5, 0.7, 12.0), accepted(6, 0.7 - loss, 12.0), ALPHA)
    assert (ends[:, : requests - SETTINGS.min_bake_requests + 1] > SETTINGS.max_drop).any(axis=1).mean() >= power


def test_the_width_is_sharpest_at_its_scale_and_shrinks() -> None:
    assert half_width(0.0, 0.1) == 0.0
    widths = [half_width(error, 0.1) for error in (0.1, 0.05, 0.02, 0.01)]
    assert widths == sorted(widths, reverse=True) and all(w > 2 * e for w, e in zip(widths, (0.1, 0.05, 0.02, 0.01), strict=True))
