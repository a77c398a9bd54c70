"""`tide report`: which period it takes, from the command line."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.fakes_drift import config_in, traffic, write_log
from tide_pipeline.cli import app
from tide_pipeline.cli.lake import _period
from tide_pipeline.config import TideConfig
from tide_pipeline.errors import InvalidRequest

NOW = 1_770_454_800.0              # 2026-02-07T09:00 UTC
HOUR = 3600.0


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIDE_CONFIG", raising=False)


@pytest.fixture
def config(tmp_path: Path) -> TideConfig:
    return config_in(tmp_path)


def report(config: TideConfig, *words: str) -> Result:
    return CliRunner().invoke(app, ["--state", str(config.state.root), "report", "--no-savings", *words])


def period_on(page: Path) -> str:
    found = re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d to [^<]*", page.read_text())
    assert found
    return found[0]


@pytest.mark.parametrize(("hours", "since", "until", "begin", "end"), [
    (None, None, None, NOW - 24 * HOUR, NOW),
    (3.0, None, None, NOW - 3 * HOUR, NOW),
    (None, "30d", None, NOW - 720 * HOUR, NOW),
    (None, "2026-02-07T06:00", "2026-02-07T07:30:00Z", NOW - 3 * HOUR, NOW - 1.5 * HOUR),
    (None, "7d", "6d", NOW - 168 * HOUR, NOW - 144 * HOUR),
    (None, "2026-02-06", "12h", NOW - 33 * HOUR, NOW - 12 * HOUR),
    (None, None, "6h", NOW - 30 * HOUR, NOW - 6 * HOUR),
    (None, "1h", "2027-01-01", NOW - HOUR, NOW),           # nothing has happened yet after now
])
def test_periods(hours: float | None, since: str | None, until: str | None, begin: float, end: float) -> None:
    assert _period(hours, since, until, NOW) == pytest.approx((begin, end))


@pytest.mark.parametrize(("hours", "since", "until", "said"), [
    (1.0, "2h", None, "leave it out beside --since and --until"),
    (1.0, None, "2h", "leave it out beside --since and --until"),
    (None, "yesterday", None, "--since yesterday: expected 30m, 12h, 7d or a time such as"),
    (None, "2d", "", "--until : expected 30m"),
    (None, "6h", "7h", "--since 6h is not before --until 7h: exchange them"),
    (None, "2026-02-07T10:00", None, "is in the future: is it local time? Add its offset"),
])
def test_periods_that_make_no_sense_are_told_what_to_do(hours: float | None, since: str | None, until: str | None, said: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        _period(hours, since, until, NOW)
    assert said in str(error.value)


def test_the_page_is_of_the_period_that_was_asked_for(config: TideConfig, tmp_path: Path) -> None:
    then = NOW - 40 * 24 * HOUR
    write_log(config, [*traffic(random.Random(1), then, then + 600, 0.7, draft_version="old"),
                       *traffic(random.Random(2), time.time() - 600, time.time() - 1, 0.7, draft_version="new")])
    out = tmp_path / "then.html"
    done = report(config, "--since", "2025-12-29T08:59", "--until", "2025-12-29T09:11", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert period_on(out) == "2025-12-29 08:59:00 to 2025-12-29 09:11:00 UTC, 12.0 minutes"
    assert "with 1 draft version" in out.read_text() and "old" in out.read_text() and ">new<" not in out.read_text()
    assert report(config).exit_code == 0 and period_on(config.state.reports / "report.html").endswith("UTC, 24.0 hours")


def test_an_error_is_one_line_and_writes_no_page(config: TideConfig) -> None:
    done = report(config, "--hours", "1", "--since", "7d")
    assert done.exit_code == 2 and done.stderr.startswith("error: --hours looks back from now") and len(done.stderr.splitlines()) == 1
    assert not config.state.reports.exists() or not list(config.state.reports.glob("*.html"))
