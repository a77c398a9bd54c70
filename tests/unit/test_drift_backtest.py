"""`tide drift backtest`: firings on a recorded shift, what they would have cost and gained, the budget, and the page."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.fakes_drift import config_in, traffic, write_log
from tide_pipeline.cli import app
from tide_pipeline.cli.drift import moment
from tide_pipeline.config import TideConfig, override
from tide_pipeline.drift.backtest import backtest
from tide_pipeline.drift.worth import Price
from tide_pipeline.errors import InvalidRequest
from tide_pipeline.report.backtest import render

NOW = float(int(time.time()))


@pytest.fixture
def config(tmp_path: Path) -> TideConfig:
    """Two workloads for twenty minutes; one falls after ten."""
    config = override(config_in(tmp_path), {"training": {"time_budget_s": 30.0}})
    rng = random.Random(9)
    for workload, rates in (("en", (0.75, 0.75)), ("de", (0.75, 0.40))):
        for half, rate in enumerate(rates):
            write_log(config, traffic(rng, NOW - 1200 + 600 * half, NOW - 600 + 600 * half, rate, workload=workload, requests_per_s=2.0))
    return config


def test_a_shift_is_found_where_it_was_and_pays(config: TideConfig) -> None:
    found = backtest(config, ["judge", "ema"], NOW - 1201, NOW)
    judge = found.outcomes[0]
    assert [firing.workload for firing in judge.firings] == ["de"] and judge.denied == 0
    assert NOW - 600 < judge.firings[0].time < NOW - 540
    assert judge.train_hours == pytest.approx(30 / 3600)
    assert judge.lost_tokens == pytest.approx(0.5 * 30 * found.tokens / 1201, rel=0.01)
    assert judge.gained_tokens > judge.lost_tokens and judge.net_tokens == judge.gained_tokens - judge.lost_tokens
    assert set(found.lines) == {("en", "v1"), ("de", "v1")}
    assert all(0 < rate < 1 for line in found.lines.values() for _, rate in line)


def test_the_budget_denies(config: TideConfig) -> None:
    (outcome,) = backtest(override(config, {"drift": {"training_hours_per_day": 0.005}}), ["judge"], NOW - 1201, NOW).outcomes
    assert outcome.firings == [] and outcome.denied >= 1 and outcome.train_hours == outcome.lost_tokens == outcome.gained_tokens == 0


def test_a_page_stands_alone(config: TideConfig) -> None:
    page = render(backtest(config, ["judge", "paper"], NOW - 1201, NOW), Price.of(config))
    assert "<svg" in page and "v1 · de" in page and "No draft was trained for this" in page
    assert "http" not in page.replace("http://www.w3.org", "") and "$" not in page
    empty = render(backtest(config, ["judge"], NOW - 9000, NOW - 8000), Price.of(config))
    assert "No request that drafted" in empty


def test_from_the_command_line(config: TideConfig, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    asked = ["--state", str(config.state.root), "--set", "drift.recent_s=20.0", "--set", "drift.min_steps=100", "drift", "backtest",
             "--since", "30m", "--policy", "judge", "--out", str(out), "--json"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    (outcome,) = json.loads(done.output)
    assert outcome["policy"] == "judge" and [firing["workload"] for firing in outcome["firings"]] == ["de"] and out.exists()


def test_bad_input_is_told_what_to_do(config: TideConfig) -> None:
    with pytest.raises(InvalidRequest, match=r"no policy nonsense: choose from judge, "):
        backtest(config, ["nonsense"], 0.0, 1.0)
    assert moment("12h", 86_400.0) == 43_200.0 and moment("2026-02-07T09:00", NOW) == 1_770_454_800.0
    for text in ("2026-02-07", "2026-02-07 00:00:00", "2026-02-07T00:00Z", "2026-02-07T01:00+01:00"):
        assert moment(text, NOW) == 1_770_422_400.0
    for text in ("", "h", "yesterday", "7w", "infd", "nanh"):
        with pytest.raises(InvalidRequest, match="expected 30m, 12h, 7d or a time"):
            moment(text, NOW)
