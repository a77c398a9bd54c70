"""The bake's decision, and the rates it is made of."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from tests.fakes_rollout import slowdown, slowdown_since
from tide_pipeline.config import RolloutSettings
from tide_pipeline.rollout import live
from tide_pipeline.rollout.bake import MIN_SPEED_BLOCKS, Decision, Evidence, judge_bake
from tide_pipeline.rollout.live import Rate, Side, Stretches, error_rise
from tide_pipeline.rollout.rows import LiveRow
from tide_pipeline.rollout.sequential import Gap

SETTINGS = RolloutSettings()           # max_drop 0.10, min_bake_steps 30, min_bake_requests 8


def seen(rate: float, error: float, steps: int, requests: int = 20) -> Rate:
    return Rate(rate, error, steps, requests)


@pytest.mark.parametrize(("baseline", "canary", "time_is_up", "decision"), [
    (seen(0.4, 0.02, 500), seen(0.7, 0.03, 200), False, Decision.FINE),
    (seen(0.7, 0.02, 500), seen(0.4, 0.03, 200), False, Decision.WORSE),
    (seen(0.7, 0.02, 500), seen(0.58, 0.05, 40), False, Decision.OPEN),          # the interval lies across 0.10
    (seen(0.7, 0.02, 500), seen(0.55, 0.03, 40), True, Decision.WORSE),          # too much, and certainly some
    (seen(0.7, 0.02, 500), seen(0.58, 0.05, 40), True, Decision.FINE),           # it may be an accident
    (seen(0.7, 0.02, 500), seen(0.62, 0.05, 40), True, Decision.FINE),
    (seen(0.7, 0.02, 500), seen(0.7, 0.1, 20), False, Decision.OPEN),            # too few steps
    (seen(0.7, 0.02, 500), seen(0.1, 0.02, 500, 3), False, Decision.OPEN),       # too few requests
    (seen(0.7, 0.02, 500), seen(0.1, 0.1, 20), True, Decision.WORSE),            # but certain
    (seen(0.7, 0.02, 500), seen(0.1, 0.1, 5), True, Decision.FINE),
    (seen(0.7, 0.02, 500), seen(0.0, 0.0, 0), False, Decision.OPEN),
    (seen(0.7, 0.02, 500), seen(0.0, 0.0, 0), True, Decision.FINE),
    (None, seen(0.1, 0.02, 100), False, Decision.FINE),
    (None, seen(0.1, 0.02, 10), False, Decision.OPEN),
])
def test_decisions(baseline: Rate | None, canary: Rate, time_is_up: bool, decision: Decision) -> None:
    found = judge_bake(Evidence(canary, baseline), SETTINGS, time_is_up=time_is_up)
    assert found.decision is decision and found.reason


rates = st.builds(Rate, st.floats(0, 1), st.floats(0, 0.5), st.integers(0, 1000), st.integers(0, 100))
gaps = st.builds(Gap, st.floats(-3, 3), st.floats(0, 2), st.integers(0, 100))


@given(st.builds(Evidence, rates, st.none() | rates, st.just(""), st.none() | gaps, st.none() | gaps, st.booleans()), st.booleans())
def test_time_always_ends_a_bake(evidence: Evidence, must_time: bool) -> None:
    open_ended = judge_bake(evidence, SETTINGS, must_time=must_time).decision
    at_the_end = judge_bake(evidence, SETTINGS, time_is_up=True, must_time=must_time).decision
    assert at_the_end is not Decision.OPEN
    assert open_ended in (Decision.OPEN, at_the_end), "what is certain before the end does not turn"
    if must_time and at_the_end is Decision.FINE:
        assert evidence.slower is not None and evidence.slower.n >= MIN_SPEED_BLOCKS and evidence.new.steps >= SETTINGS.min_bake_steps
    without = judge_bake(evidence, SETTINGS, time_is_up=True).decision
    assert without is at_the_end or (must_time and without is Decision.FINE), "to have to time it makes no draft better"


def test_slower_steps_and_errors_send_back_and_never_delay() -> None:
    good = Evidence(seen(0.7, 0.02, 500), seen(0.5, 0.02, 500))
    for gap, decision in ((Gap(0.9, 0.1, 20), Decision.WORSE), (Gap(0.9, 0.1, 5), Decision.FINE), (Gap(0.3, 0.1, 20), Decision.FINE)):
        assert judge_bake(replace(good, slower=gap), SETTINGS).decision is decision
    broken = judge_bake(replace(good, errors=Gap(0.5, 0.05, 40)), SETTINGS)
    assert broken.decision is Decision.WORSE and "share of errors, rise +0.50" in broken.reason


def block(at: float, replica: str, ms: float, emitted: int = 10, finish: str = "") -> LiveRow:
    return LiveRow(at, f"{replica}-{at}", "de", replica, "v1", 10, 5, emitted, ms, finish)


def side(rows: Iterable[LiveRow]) -> Side:
    found = Side()
    for row in rows:
        found.add(row)
    return found


def test_what_slows_the_whole_machine_is_no_difference() -> None:
    times = [2.0 * i for i in range(12)]
    load = [1.0 + i % 4 for i in range(12)]
    even = slowdown([block(t, "a", 50 * w) for t, w in zip(times, load, strict=True)],
                    [block(t, "b", 50 * w) for t, w in zip(times, load, strict=True)])
    slow = slowdown([block(t, "a", 100 * w) for t, w in zip(times, load, strict=True)],
                    [block(t, "b", 50 * w) for t, w in zip(times, load, strict=True)])
    assert even == Gap(0.0, 0.0, 12) and slow is not None and slow.value == pytest.approx(0.693, abs=0.01)
    assert slowdown([block(t, "a", 50) for t in times], [block(t + 100, "b", 50) for t in times]) is None, "never at the same time"


def test_a_replica_alone_is_compared_with_itself_at_the_same_batch_size() -> None:
    """Twice the batch takes twice the time here: that is load, not the draft."""
    def stretch(at: float, batch: int, ms: float) -> LiveRow:
        return replace(block(at, "a", ms * batch), batch=float(batch))

    rng = random.Random(1)
    old = [stretch(2.0 * i, 1 + i % 2, 50 * rng.uniform(0.9, 1.1)) for i in range(24)]
    busier = [stretch(100 + 2.0 * i, 2, 50 * rng.uniform(0.9, 1.1)) for i in range(20)]
    even = slowdown_since(busier, old)
    assert even is not None and abs(even.value) < 0.1 and even.n == 12, "the 12 old ones at a batch of 2"
    slow = slowdown_since([replace(row, duration_ms=2 * row.duration_ms) for row in busier], old)
    assert slow is not None and slow.value == pytest.approx(even.value + 0.693, abs=0.001) and 0.01 < slow.error < 0.1
    assert slowdown_since([replace(row, batch=64.0) for row in busier], old) is None, "nothing alike"
    assert slowdown_since(busier[:1], old[:2]) is None and slowdown_since([], old) is None


def test_errors_are_counted_over_finished_requests() -> None:
    new = [block(float(i), "a", 50, finish="error" if i % 2 else "length") for i in range(40)] + [block(99.0, "a", 50)]
    old = [block(float(i), "b", 50, finish="cancelled" if i % 2 else "stop") for i in range(60)]
    found = error_rise(side(new), side(old))
    assert found is not None and (found.value, found.n) == (0.5, 40) and 0.05 < found.error < 0.1
    assert error_rise(side(new), Side()) is None


def test_hours_of_stretches_are_no_more_memory_and_the_same_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    rows = [[block(2.0 * i, name, 50 * rng.uniform(0.8, 1.2) * (1 + (name == "a"))) for i in range(400)] for name in "ab"]
    every = slowdown(*rows)
    monkeypatch.setattr(live, "MAX_BLOCKS", 20)
    found = slowdown(*rows)
    assert found is not None and every is not None and found.n == every.n == 400
    assert (found.value, found.error) == pytest.approx((every.value, every.error)) and found.value == pytest.approx(0.69, abs=0.03)
    both = Stretches(sides=2)
    for row in rows[0]:
        both.add(row, side=0)
        assert len(both._blocks) <= 20
    both.add(rows[1][0], side=1)
    assert live.slowdown(both) is None, "a row that comes minutes late counts nowhere"


def test_a_rate_counts_steps_and_its_error_counts_requests() -> None:
    rows = [LiveRow(0.0, f"r{i}", "de", "a", "v1", 10, 10 if i % 2 else 0) for i in range(20)]
    found = side(rows).rate()
    assert (found.rate, found.steps, found.requests) == (0.5, 200, 20)
    assert found.error > 2 * (0.25 / 200) ** 0.5, "requests that differ are no 200 independent steps"
    assert side(replace(row, drafted=0, accepted=0) for row in rows).rate() == Rate(0.0, 0.0, 0)
    assert side(rows[:1]).rate().error > 0, "one request is not certain"


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 9), st.floats(0, 1)), min_size=1), st.randoms())
def test_a_request_is_one_however_many_rows_it_has(blocks: list[tuple[str, int, float]], rng: random.Random) -> None:
    """In the order of the log, requests side by side; the ratio estimator written down once more, over whole requests."""
    rows = [LiveRow(0.0, name, "de", "a", "v1", drafted, round(drafted * share)) for name, drafted, share in blocks]
    last = {row.request_id: i for i, row in enumerate(rows)}
    rows = [replace(row, finish_reason="stop") if last[row.request_id] == i and rng.random() < 0.5 else row for i, row in enumerate(rows)]
    found, sums = side(rows).rate(), [(sum(r.drafted for r in rows if r.request_id == name), sum(r.accepted for r in rows if
                                       r.request_id == name)) for name in last]
    sums = [(d, a) for d, a in sums if d]
    steps, n = sum(d for d, _ in sums), len(sums)
    assert (found.steps, found.requests) == (steps, n)
    if steps:
        rate = sum(a for _, a in sums) / steps
        smoothed = (sum(a for _, a in sums) + 1) / (steps + 2)
        spread = sum((a - rate * d) ** 2 for d, a in sums) * n / max(n - 1, 1) / steps**2
        assert (found.rate, found.error**2) == pytest.approx((rate, max(spread, smoothed * (1 - smoothed) / steps)))


def test_requests_whose_end_is_never_logged_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MAX_GOING", 10)
    found = Side()
    for i in range(100):
        found.add(LiveRow(0.0, "long", "de", "a", "v1", 1, 1))
        found.add(LiveRow(0.0, f"cut off {i}", "de", "a", "v1", 4, 1))
        assert len(found._going) <= 10 and "long" in found._going
    assert found.rate().requests == 101 and found.rate().steps == 500


def test_the_interval_covers_the_truth() -> None:
    rng, missed = random.Random(0), 0
    for _ in range(300):
        requests = [rng.betavariate(6, 4) for _ in range(25)]                    # true mean 0.6
        rows = [LiveRow(0.0, str(i), "de", "a", "v1", 12, sum(rng.random() < p for _ in range(12))) for i, p in enumerate(requests)]
        found = side(rows).rate()
        missed += abs(found.rate - 0.6) > 1.96 * found.error
    assert missed / 300 < 0.1
