"""Rates and verdicts: SQL adds up what the formulas say, intervals cover, verdicts follow from their numbers."""

from __future__ import annotations

import math
import random
import time
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes_drift import acceptance_row, config_in, write_log
from tide_pipeline.config import DriftSettings
from tide_pipeline.drift.acceptance import SLICES, recent
from tide_pipeline.drift.judge import judge
from tide_pipeline.drift.rates import RateEstimate, clustered, drop_interval, student_975

shares = st.floats(0.0, 1.0)
estimates = st.builds(RateEstimate, rate=shares, variance=st.floats(1e-8, 0.05) | st.just(math.inf), freedom=st.integers(1, 500),
                      steps=st.integers(0, 5000), requests=st.integers(0, 500))


@given(recent=st.none() | estimates, baseline=st.none() | estimates, min_drop=st.floats(0.01, 0.5))
def test_a_verdict_follows_from_its_numbers(recent: RateEstimate | None, baseline: RateEstimate | None, min_drop: float) -> None:
    v = judge(target="t", workload="w", draft_version="v1", recent=recent, baseline=baseline, settings=DriftSettings(min_drop=min_drop))
    assert -1 <= v.drop_low <= v.drop_high <= 1 and (not v.enough_data or v.drop_low <= v.drop <= v.drop_high)
    assert v.drifted == (v.enough_data and v.drop_low >= min_drop)
    assert v.enough_data or "too little data" in v.reason
    assert not v.enough_data or f"over {v.num_steps} steps" in v.reason


@given(baseline=estimates, rates=st.tuples(shares, shares), variance=st.floats(1e-6, 0.01))
def test_a_lower_rate_is_never_less_of_a_drift(baseline: RateEstimate, rates: tuple[float, float], variance: float) -> None:
    worse, better = (RateEstimate(rate, variance, 40, 1000, 50) for rate in sorted(rates))
    assert drop_interval(worse, baseline)[1] >= drop_interval(better, baseline)[1] - 1e-12


@given(floor=st.floats(0, 0.01), squares=st.floats(0, 0.01), requests=st.integers(1, 100), slices=st.integers(1, SLICES))
def test_never_surer_than_independent_steps(floor: float, squares: float, requests: int, slices: int) -> None:
    estimate = clustered(0.5, 100, requests, slices, squares, floor)
    assert estimate.variance >= floor and (requests > slices or estimate.variance == math.inf)


@pytest.mark.parametrize(("freedom", "quantile"), [(3, 3.182), (4, 2.776), (7, 2.365), (15, 2.131), (30, 2.042), (math.inf, 1.960)])
def test_students_t(freedom: float, quantile: float) -> None:
    assert student_975(freedom) == pytest.approx(quantile, rel=0.01)


def test_intervals_cover_the_true_drop() -> None:
    """Requests of one text resemble themselves: with steps taken as independent these intervals would cover less than 80 %."""
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(600):
        drop, low, high = drop_interval(_sampled(rng, 0.45, 12), _sampled(rng, 0.70, 20))
        assert low <= drop <= high
        hits.append(low <= 0.25 <= high)
    assert 0.92 <= np.mean(hits) <= 0.98


@given(seed=st.integers(0, 10_000))
@settings(max_examples=12)
def test_sql_adds_up_what_the_formulas_say(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    rng, now = random.Random(seed), float(int(time.time()))
    config = config_in(tmp_path_factory.mktemp("log"), min_steps=rng.choice([1, 50, 1000]))
    rows = []
    for i in range(rng.randrange(1, 60)):
        drafted = rng.choice([0, 1, 5, 30])
        rows.append(acceptance_row(now - rng.randrange(0, 240), request_id=f"r{i % 17}", draft_length=1 if drafted else 0,
                                   num_steps=drafted + rng.randrange(20), drafted=(drafted,) if drafted else (),
                                   accepted=(rng.randint(0, drafted),) if drafted else ()))
    write_log(config, rows)
    found = recent(config, now, {"en": "v1"}, {"en": now - 230.0}).get("en")
    wanted = _by_hand(now, config.drift, [(r.time, r.request_id, r.num_steps, *(r.drafted or (0,)), *(r.accepted or (0,)))
                                          for r in rows if now - 200 < r.time])
    if wanted is None:
        assert found is None
    else:
        assert found is not None and (found.steps, found.requests) == (wanted.steps, wanted.requests)
        assert (found.rate, found.variance) == (pytest.approx(wanted.rate), pytest.approx(wanted.variance))


def _by_hand(now: float, drift: DriftSettings, rows: list[tuple[float, str, int, int, int]]) -> RateEstimate | None:
    """The docstring of rates.py, line by line."""
    if not any(d for _, _, _, d, _ in rows):
        return None
    begin, newer = now - drift.recent_s, 0
    for at, _, _, d, _ in sorted(rows, key=lambda row: (-row[0], row[1])):
        if newer < drift.min_steps:
            begin = min(begin, at)
        newer += d
    n, d_of, a_of = defaultdict(int), defaultdict(int), defaultdict(int)
    for at, request, steps, d, a in rows:
        if at >= begin:
            s = min(SLICES - 1, math.floor((at - begin) / (now - begin) * SLICES))
            n[s] += steps
            d_of[s, request] += d
            a_of[s, request] += a
    total = {s: sum(d for (slice_, _), d in d_of.items() if slice_ == s) for s in n}
    used = [s for s in n if total[s]]
    weight = {s: n[s] / sum(n[t] for t in used) for s in used}
    accepted = {s: sum(a for (slice_, _), a in a_of.items() if slice_ == s) for s in used}
    rate = {s: accepted[s] / total[s] for s in used}
    u: dict[str, float] = defaultdict(float)
    for (s, request), d in d_of.items():
        if d:
            u[request] += weight[s] * (a_of[s, request] - rate[s] * d) / total[s]
    smooth = {s: (accepted[s] + 1) / (total[s] + 2) for s in used}
    return clustered(sum(weight[s] * rate[s] for s in used), sum(total.values()), len(u), len(used), sum(x * x for x in u.values()),
                     sum(weight[s] ** 2 * smooth[s] * (1 - smooth[s]) / total[s] for s in used))


def _sampled(rng: np.random.Generator, rate: float, requests: int) -> RateEstimate:
    """Requests whose own rates scatter by 0.12 around `rate`, 20 to 40 steps each."""
    steps = rng.integers(20, 41, requests)
    accepted = rng.binomial(steps, np.clip(rng.normal(rate, 0.12, requests), 0, 1))
    total = int(steps.sum())
    share = float(accepted.sum()) / total
    squares = float((((accepted - share * steps) / total) ** 2).sum())
    return clustered(share, total, requests, 1, squares, share * (1 - share) / total)
