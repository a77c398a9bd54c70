"""What a draft was promoted with is kept: for other processes, past the log's retention, and in pieces the same as at once."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import pytest

from tests.fakes_drift import acceptance_row, config_in, traffic, write_log
from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import AcceptanceRow
from tide_pipeline.drift import early
from tide_pipeline.drift.early import baseline_steps, early_life
from tide_pipeline.drift.judge import judge_drift
from tide_pipeline.drift.promoted import noted

NOW = float(int(time.time()))


@pytest.fixture
def config(tmp_path: Path) -> TideConfig:
    return config_in(tmp_path)


def another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early, "_seen", {})


def test_a_draft_that_outlives_the_log_keeps_its_baseline(config: TideConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the note the worn draft would be compared with itself, and slow decay would never be seen."""
    rng = random.Random(3)
    write_log(config, traffic(rng, NOW - 200, NOW - 100, 0.8))
    before = early_life(config, "v1", None)
    assert noted(config, "v1", baseline_steps(config.drift)) == before
    shutil.rmtree(Path(config.state.acceptance))           # retention
    write_log(config, traffic(rng, NOW - 100, NOW, 0.4))
    another_process(monkeypatch)
    (verdict,) = judge_drift(config, NOW)
    assert verdict.drifted and verdict.baseline_rate == before.overall.estimate.rate  # type: ignore[union-attr]


def test_nothing_is_noted_that_can_still_change(config: TideConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    write_log(config, [acceptance_row(NOW - 100 + i) for i in range(5)])
    assert not early_life(config, "v1", None).is_final
    assert noted(config, "v1", baseline_steps(config.drift)) is None and not config.state.drift.exists()


def test_a_note_of_another_log_or_one_cut_short_does_not_count(config: TideConfig, monkeypatch: pytest.MonkeyPatch,
                                                               caplog: pytest.LogCaptureFixture) -> None:
    write_log(config, traffic(random.Random(4), NOW - 200, NOW, 0.8, draft_version="v/1"))
    life = early_life(config, "v/1", None)
    (path,) = config.state.drift.rglob("*.json")
    assert path.name == "v%2F1-400.json"
    whole = path.read_text()
    for text in (whole[:50], whole.replace("acceptance\"", "elsewhere\""), "[]", "{}"):
        path.write_text(text)
        another_process(monkeypatch)
        assert early_life(config, "v/1", None) == life, text
        assert path.read_text() == whole, "noted again"
    assert "looking into the log instead" in caplog.text


def test_a_baseline_that_says_little_goes_on(config: TideConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine unlike requests settled a draft at 0.60 (0.34 to 0.86) for good: a fall to 0.34 was no drift for fifty minutes of a soak."""
    began = time.time() - 100              # later looks take what is no more than ten minutes late

    def request(i: int, first: int) -> AcceptanceRow:
        return acceptance_row(began + i, request_id=f"r{i}", drafted=(50, 0, 0), accepted=(first, 0, 0))

    write_log(config, [request(i, 50 if i % 2 else 10) for i in range(9)])
    life = early_life(config, "v1", None)
    assert life.overall is not None and life.overall.estimate.steps == 450 and not life.is_final
    write_log(config, [request(i, 35) for i in range(9, 40)])
    overall = early_life(config, "v1", None).overall
    assert overall is not None and overall.is_complete and overall.estimate.requests == 32 and overall.estimate.variance**0.5 <= 0.05
    another_process(monkeypatch)
    assert early_life(config, "v1", None).overall == overall


def test_requests_that_never_agree_are_waited_for_so_long_and_no_longer(config: TideConfig) -> None:
    write_log(config, [acceptance_row(NOW - 900 + i, request_id=f"r{i}", drafted=(50, 0, 0), accepted=(50 * (i % 3 > 0), 0, 0))
                       for i in range(80)])
    overall = early_life(config, "v1", None).overall
    assert overall is not None and overall.is_complete and overall.estimate.requests == 64 and overall.estimate.variance**0.5 > 0.05


@pytest.mark.parametrize("most", [1, 7, 64])
def test_the_log_in_small_pieces_gives_the_same_life(config: TideConfig, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Rows of one instant, a rare workload, and rows that come after others that are younger."""
    rows = [acceptance_row(NOW - 100 + i // 5, request_id=f"r{i % 5}-{i // 15}", workload="rare" if i % 5 == 0 else "en",
                           accepted=(20 + i % 7, 10, 5)) for i in range(150)]
    random.Random(5).shuffle(rows)
    for part in (rows[:60], rows[60:]):
        write_log(config, part)
    life = early_life(config, "v1", None)
    assert life.is_final and set(life.by_workload or {}) == {"en", "rare"}
    monkeypatch.setattr(early, "MOST_ROWS", most)
    monkeypatch.setattr(early, "noted", lambda *_: None)
    another_process(monkeypatch)
    assert early_life(config, "v1", None) == life
