"""Drift verdicts on synthetic logs: when to speak up, when to keep quiet, when to say that too little is known."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.fakes_drift import acceptance_row, config_in, deploy, traffic, write_build, write_log
from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import AcceptanceRow, DriftVerdict
from tide_pipeline.drift.judge import judge_drift

HEALTHY, STALE = 0.74, 0.40


@pytest.fixture
def config(tmp_path: Path) -> TideConfig:
    return config_in(tmp_path)


@pytest.fixture
def rng() -> random.Random:
    return random.Random(1)


def verdicts(config: TideConfig, now: float, rows: Iterable[AcceptanceRow]) -> dict[str, DriftVerdict]:
    write_log(config, rows)
    return {v.workload: v for v in judge_drift(config, now)}


def test_nothing_to_judge(config: TideConfig) -> None:
    now = float(int(time.time()))
    assert judge_drift(config) == []
    assert verdicts(config, now, [acceptance_row(now - 300), acceptance_row(now - 1, draft_version="", drafted=(), accepted=())]) == {}


def test_no_change_no_alarm(config: TideConfig, rng: random.Random) -> None:
    """16 independent streams, looked at every 10 s for 80 s: no false alarm in 128 looks."""
    now = float(int(time.time()))
    write_log(config, [row for i in range(16) for row in traffic(rng, now - 200, now, rng.uniform(0.3, 0.9), spread=0.12,
                                                                  requests_per_s=2.0, workload=f"w{i}", draft_version=f"v{i}")])
    looks = [v for back in range(0, 80, 10) for v in judge_drift(config, now - back)]
    assert len(looks) == 128 and all(v.enough_data for v in looks)
    assert [v.reason for v in looks if v.drifted] == []


def test_an_abrupt_drop_is_found_in_every_stream(config: TideConfig, rng: random.Random) -> None:
    now = float(int(time.time()))
    rows = [row for i in range(8) for begin, end, rate in ((now - 120, now - 20, HEALTHY), (now - 20, now, STALE))
            for row in traffic(rng, begin, end, rate, requests_per_s=2.0, workload=f"w{i}", draft_version=f"v{i}")]
    found = verdicts(config, now, rows)
    assert len(found) == 8 and all(v.drifted for v in found.values())
    assert all(v.drop_low <= v.baseline_rate - v.first_position_rate <= v.drop_high for v in found.values())


def test_the_sentence_has_the_numbers(config: TideConfig, rng: random.Random) -> None:
    now = float(int(time.time()))
    v = verdicts(config, now, [*traffic(rng, now - 120, now - 20, HEALTHY), *traffic(rng, now - 20, now, STALE)])["en"]
    assert v.reason == (f"first-position acceptance {v.first_position_rate:.2f}, baseline {v.baseline_rate:.2f}, drop {v.drop:.2f} "
                        f"({v.drop_low:.2f} to {v.drop_high:.2f}) over {v.num_steps} steps: lower end >= 0.10")
    assert (v.target, v.draft_version) == (config.target, "v1") and v.num_steps == pytest.approx(2400, abs=30) and v.baseline_steps >= 400


def test_only_the_workload_that_fell(config: TideConfig, rng: random.Random) -> None:
    now = float(int(time.time()))
    found = verdicts(config, now, [*traffic(rng, now - 120, now, HEALTHY), *traffic(rng, now - 120, now - 20, 0.6, workload="de"),
                                   *traffic(rng, now - 20, now, 0.3, workload="de")])
    assert (found["en"].drifted, found["de"].drifted) == (False, True)


def test_a_harder_workload_is_compared_with_itself(config: TideConfig, rng: random.Random) -> None:
    now = float(int(time.time()))
    found = verdicts(config, now, [*traffic(rng, now - 120, now, HEALTHY), *traffic(rng, now - 120, now, 0.45, workload="de")])
    assert not found["de"].drifted and found["de"].baseline_rate == pytest.approx(0.45, abs=0.1)


def test_a_workload_that_came_later_is_compared_with_what_the_draft_was_promoted_for(config: TideConfig, rng: random.Random) -> None:
    now = float(int(time.time()))
    rows = [*traffic(rng, now - 120, now, HEALTHY), *traffic(rng, now - 50, now, 0.35, workload="new")]
    found = verdicts(config, now, rows)
    assert found["new"].drifted and found["new"].baseline_rate == pytest.approx(HEALTHY, abs=0.1)


def test_controller_off_probes_alone_are_judged(config: TideConfig, rng: random.Random) -> None:
    """1 % of steps are probes: 24 a window, so the window reaches back until there are enough."""
    now = float(int(time.time()))
    before = list(traffic(rng, now - 400, now - 120, HEALTHY))
    v = verdicts(config, now, [*before, *traffic(rng, now - 120, now, STALE, drafted_share=0.01)])["en"]
    assert v.drifted and 100 <= v.num_steps < 130
    healthy = config_in(config.state.root / "healthy")
    v = verdicts(healthy, now, [*before, *traffic(rng, now - 120, now, HEALTHY, drafted_share=0.01)])["en"]
    assert v.enough_data and not v.drifted


def test_dense_drafting_before_a_shift_does_not_outvote_probes_after_it(config: TideConfig, rng: random.Random) -> None:
    """A third of the traffic is healthy with every step drafted, the rest stale with a twentieth drafted: the rate is the traffic's."""
    now = float(int(time.time()))
    v = verdicts(config, now, [*traffic(rng, now - 200, now - 10, HEALTHY), *traffic(rng, now - 10, now, STALE, drafted_share=0.05,
                                                                                     requests_per_s=8.0)])["en"]
    assert v.first_position_rate == pytest.approx((HEALTHY + 2 * STALE) / 3, abs=0.1)      # by step: 0.71


def test_too_little_data_says_what_is_missing(config: TideConfig, rng: random.Random) -> None:
    now = float(int(time.time()))
    v = verdicts(config, now, traffic(rng, now - 2, now, HEALTHY))["en"]
    assert not v.enough_data and not v.drifted and (v.drop_low, v.drop_high) == (-1.0, 1.0)
    assert v.reason == "too little data: the baseline of v1 has 240 of 400 drafted steps, of 8 requests or more"
    before = list(traffic(rng, now - 900, now - 800, HEALTHY))
    later = config_in(config.state.root / "later")
    v = verdicts(later, now, [*before, *traffic(rng, now - 1, now, STALE, requests_per_s=2)])["en"]
    assert v.reason == "too little data: 60 of 100 drafted steps of v1 since its baseline, in the last 200 s"
    few = config_in(config.state.root / "few")
    v = verdicts(few, now, [*before, *traffic(rng, now - 1, now, STALE, requests_per_s=3, steps=60)])["en"]
    assert v.reason == "too little data: 3 of 8 requests of v1 that drafted"


def test_the_deployed_version_is_judged(config: TideConfig, rng: random.Random) -> None:
    """A canary's rows, and those of requests that keep the old draft to their end, do not count."""
    now = float(int(time.time()))
    write_build(config, "a1", "v1")
    write_build(config, "b2", "v2")
    deploy(config, {"*": "a1"}, now - 500)
    rows = [*traffic(rng, now - 200, now, HEALTHY), *traffic(rng, now - 30, now, 0.1, draft_version="v2")]
    v = verdicts(config, now, rows)["en"]
    assert (v.draft_version, v.drifted) == ("v1", False)
    deploy(config, {"*": "a1", "en": "b2"}, now - 30)
    (v,) = judge_drift(config, now)
    assert v.draft_version == "v2" and v.baseline_rate == pytest.approx(0.1, abs=0.06) and not v.drifted
    deploy(config, {"*": "gone"}, now)                     # its build was deleted: then what is seen is judged
    assert judge_drift(config, now)[0].draft_version in ("v1", "v2")


def test_the_early_life_stays_what_it_was(config: TideConfig, rng: random.Random) -> None:
    """Read again from memory once complete, and the same when it is read from the log."""
    now = float(int(time.time()))
    v = verdicts(config, now - 60, traffic(rng, now - 200, now - 60, HEALTHY))["en"]
    write_log(config, traffic(rng, now - 60, now, STALE))
    (again,) = judge_drift(config, now)
    assert again.baseline_rate == v.baseline_rate and again.drifted


def test_one_long_request_is_no_baseline(config: TideConfig, rng: random.Random) -> None:
    """400 steps of a single request say nothing of how requests differ: the early life goes on until 8 requests are in it."""
    now = float(int(time.time()))
    long = [acceptance_row(now - 200 + i, request_id="long", draft_length=1, drafted=(64,), accepted=(50,), num_steps=64)
            for i in range(10)]
    v = verdicts(config, now, [*long, *traffic(rng, now - 100, now, HEALTHY)])["en"]
    assert v.enough_data and v.baseline_steps == 640 + 7 * 30
