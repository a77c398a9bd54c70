"""The bake's decision, and the rates it is made of."""

from __future__ import annotations

import random
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from tests.fakes_rollout import FakeReplica, write_engine
from tide_pipeline.config import RolloutSettings
from tide_pipeline.rollout.bake import Decision, judge_bake
from tide_pipeline.rollout.live import LiveRow, Rate, rate_of, read_live

SETTINGS = RolloutSettings()           # max_drop 0.10, min_bake_steps 30


@pytest.mark.parametrize(("baseline", "canary", "time_is_up", "decision"), [
    (Rate(0.4, 0.02, 500), Rate(0.7, 0.03, 200), False, Decision.FINE),
    (Rate(0.7, 0.02, 500), Rate(0.4, 0.03, 200), False, Decision.WORSE),
    (Rate(0.7, 0.02, 500), Rate(0.58, 0.05, 40), False, Decision.OPEN),          # the interval lies across 0.10
    (Rate(0.7, 0.02, 500), Rate(0.58, 0.05, 40), True, Decision.WORSE),
    (Rate(0.7, 0.02, 500), Rate(0.62, 0.05, 40), True, Decision.FINE),
    (Rate(0.7, 0.02, 500), Rate(0.7, 0.1, 20), False, Decision.OPEN),            # too few steps
    (Rate(0.7, 0.02, 500), Rate(0.1, 0.1, 20), True, Decision.WORSE),            # but certain
    (Rate(0.7, 0.02, 500), Rate(0.1, 0.1, 5), True, Decision.FINE),
    (Rate(0.7, 0.02, 500), Rate(0.0, 0.0, 0), False, Decision.OPEN),
    (Rate(0.7, 0.02, 500), Rate(0.0, 0.0, 0), True, Decision.FINE),
    (None, Rate(0.1, 0.02, 100), False, Decision.FINE),
    (None, Rate(0.1, 0.02, 10), False, Decision.OPEN),
])
def test_decisions(baseline: Rate | None, canary: Rate, time_is_up: bool, decision: Decision) -> None:
    found = judge_bake(baseline, canary, SETTINGS, time_is_up=time_is_up)
    assert found.decision is decision and found.reason


rates = st.builds(Rate, st.floats(0, 1), st.floats(0, 0.5), st.integers(0, 1000))


@given(st.none() | rates, rates)
def test_time_always_ends_a_bake(baseline: Rate | None, canary: Rate) -> None:
    open_ended = judge_bake(baseline, canary, SETTINGS).decision
    at_the_end = judge_bake(baseline, canary, SETTINGS, time_is_up=True).decision
    assert at_the_end is not Decision.OPEN
    assert open_ended in (Decision.OPEN, at_the_end), "what is certain before the end does not turn"


def test_a_rate_counts_steps_and_its_error_counts_requests() -> None:
    rows = [LiveRow(0.0, f"r{i}", "de", "a", "v1", 10, 10 if i % 2 else 0) for i in range(20)]
    found = rate_of(rows, lambda r: True)
    assert (found.rate, found.steps) == (0.5, 200)
    assert found.error > 2 * (0.25 / 200) ** 0.5, "requests that differ are no 200 independent steps"
    assert rate_of(rows, lambda r: r.workload == "py") == Rate(0.0, 0.0, 0)
    assert rate_of(rows[:1], lambda r: True).error > 0, "one request is not certain"


def test_the_interval_covers_the_truth() -> None:
    rng, missed = random.Random(0), 0
    for _ in range(300):
        requests = [rng.betavariate(6, 4) for _ in range(25)]                    # true mean 0.6
        rows = [LiveRow(0.0, str(i), "de", "a", "v1", 12, sum(rng.random() < p for _ in range(12))) for i, p in enumerate(requests)]
        found = rate_of(rows, lambda r: True)
        missed += abs(found.rate - 0.6) > 1.96 * found.error
    assert missed / 300 < 0.1


def test_the_log_is_read_as_capture_writes_it(tmp_path: Path, tiny_dir: Path) -> None:
    config = write_engine(tmp_path, tiny_dir)
    assert read_live(config, 0.0) == []
    replica = FakeReplica(config, "replica-0", traffic=False)
    with replica:
        replica.serve(3)
    rows = read_live(config, 0.0)
    assert len(rows) == 3 and {(r.workload, r.replica, r.draft_version, r.drafted) for r in rows} == {("de", "replica-0", "", 0)}
    assert read_live(config, rows[-1].at + 1) == []
    shard = next(config.state.acceptance.rglob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-200] + b"x" * 196 + b"PAR1")
    assert read_live(config, 0.0) == []
