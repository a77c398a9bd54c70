"""Series and live figures: what is emitted lands in the bucket it was emitted in, and sums agree with the log."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path

import pytest

from tests.fakes_drift import acceptance_row, config_in, traffic, write_log
from tide_pipeline.config import TideConfig
from tide_pipeline.drift.series import acceptance_series, live


@pytest.fixture
def config(tmp_path: Path) -> TideConfig:
    return config_in(tmp_path)


def test_empty(config: TideConfig) -> None:
    assert acceptance_series(config, 0.0, 5.0) == []
    nothing = live(config)
    assert (nothing.age_s, nothing.tokens_per_s, nothing.acceptance_length, nothing.workloads) == (math.inf, 0.0, 1.0, ())


def test_a_block_is_spread_over_the_time_it_took(config: TideConfig) -> None:
    base = 1_000_000.0
    write_log(config, [acceptance_row(base + 12, duration_ms=10_000.0, emitted_tokens=99, num_steps=40, drafted=(40, 40),
                                      accepted=(20, 10))])
    buckets = acceptance_series(config, base, 5.0, base + 20)
    assert [(b.time - base, b.seconds, b.tokens_per_s, b.steps) for b in buckets] == [
        (0.0, 5.0, pytest.approx(6.0), 12), (5.0, 5.0, pytest.approx(10.0), 20), (10.0, 5.0, pytest.approx(4.0), 8)]
    assert all(b.first_position_rate == pytest.approx(0.5) and b.acceptance_length == pytest.approx(1.75) for b in buckets)


def test_ends_of_the_period_are_cut(config: TideConfig) -> None:
    base = 1_000_000.0
    write_log(config, [acceptance_row(base + 10, duration_ms=10_000.0, emitted_tokens=99)])
    buckets = acceptance_series(config, base + 3, 5.0, base + 9)
    assert [(b.time - base, b.seconds) for b in buckets] == [(0.0, 2.0), (5.0, 4.0)]
    assert all(b.tokens_per_s == pytest.approx(10.0) for b in buckets)


def test_side_by_side_blocks_share_their_time(config: TideConfig) -> None:
    base = 1_000_000.0
    write_log(config, [acceptance_row(base + 10, request_id="r", duration_ms=5000.0, finish_reason="", emitted_tokens=50),
                       acceptance_row(base + 10, request_id="r", duration_ms=5000.0, emitted_tokens=49, drafted=(), accepted=(),
                                      draft_length=0)])
    assert [b.tokens_per_s for b in acceptance_series(config, base, 2.0, base + 10)] == [pytest.approx(10.0)] * 5


def test_apart_by_workload_and_version_and_nothing_is_lost(config: TideConfig) -> None:
    base, rng = 1_000_000.0, random.Random(0)
    rows = [*traffic(rng, base, base + 60, 0.7), *traffic(rng, base, base + 60, 0.3, workload="de", drafted_share=0.0),
            *traffic(rng, base + 30, base + 60, 0.5, draft_version="v2")]
    write_log(config, rows)
    buckets = acceptance_series(config, base - 10, 7.0, base + 61)
    assert {(b.workload, b.draft_version) for b in buckets} == {("en", "v1"), ("en", "v2"), ("de", "v1")}
    assert all(b.first_position_rate is None for b in buckets if b.workload == "de")
    assert sum(b.tokens_per_s * b.seconds for b in buckets) == pytest.approx(sum(r.emitted_tokens + 1 for r in rows))
    assert [b.time for b in buckets] == sorted(b.time for b in buckets) and all(b.time % 7 == 0 for b in buckets)


def test_live_is_the_newest_seconds(config: TideConfig) -> None:
    now, rng = time.time(), random.Random(0)
    write_log(config, [*traffic(rng, now - 40, now - 3, 0.9), *traffic(rng, now - 8, now - 3, 0.2, draft_version="v2", requests_per_s=8)])
    stats = live(config, 5.0, now)
    assert stats.age_s == pytest.approx(3.0) and stats.draft_version in ("v1", "v2") and stats.requests == 60
    assert stats.tokens_per_s == pytest.approx(sum(w.tokens_per_s for w in stats.workloads))
    assert stats.drafted_share == 1.0 and stats.acceptance_length == pytest.approx(1 + stats.first_position_rate)
    assert live(config, 5.0, now + 120).tokens_per_s == 0.0
