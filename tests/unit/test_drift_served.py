"""Step times and survival out of an acceptance log: what is counted, what is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fakes_drift import acceptance_row, config_in, write_log
from tide_pipeline.config import TideConfig
from tide_pipeline.drift.served import PRIOR_RATE, Survival, step_cells, survival
from tide_pipeline.engine.trtllm.schedule import StepCell

BASE = 1_000_000.0
SIZES = (1, 2, 4, 8)


@pytest.fixture
def config(tmp_path: Path) -> TideConfig:
    return config_in(tmp_path)


def row(at: float = BASE, **changes: Any) -> Any:
    return acceptance_row(at, **{"request_id": f"{at}{changes}", **changes})


def cells(config: TideConfig, since: float = BASE - 60, until: float = BASE + 60) -> list[StepCell]:
    return list(step_cells(config, "engine", SIZES, since, until))


def test_an_empty_log_holds_nothing(config: TideConfig) -> None:
    assert cells(config) == [] and survival(config, "engine", 0.0, BASE) == []


def test_cells_are_medians_by_the_size_that_a_batch_is_padded_to(config: TideConfig) -> None:
    write_log(config, [row(mean_batch_size=3.0, duration_ms=300.0), row(mean_batch_size=4.0, duration_ms=330.0),
                       row(mean_batch_size=3.6, duration_ms=9000.0),                                       # a stall
                       row(mean_batch_size=5.0, duration_ms=600.0, draft_length=1, drafted=(30,), accepted=(20,)),
                       row(mean_batch_size=1.0, duration_ms=150.0, draft_length=0, drafted=(), accepted=())])
    assert cells(config) == [StepCell(1, 0, 5.0, 30.0), StepCell(4, 3, 11.0, pytest.approx(30 / 3 + 30 / 4 + 30 / 3.6)),
                             StepCell(8, 1, 20.0, 6.0)]


def test_what_does_not_count(config: TideConfig) -> None:
    write_log(config, [row(is_probe=True), row(engine_digest="other"), row(BASE - 61), row(BASE + 61), row(mean_batch_size=9.0),
                       row(num_steps=0, drafted=(), accepted=(), duration_ms=0.0)])
    assert cells(config) == []


def test_survival_is_of_the_tokens_that_were_reached(config: TideConfig) -> None:
    """Length 1 tells nothing of the second token; a draft that ended early reached it less often."""
    write_log(config, [row(drafted=(30, 30, 30), accepted=(24, 18, 12)), row(draft_length=1, drafted=(30,), accepted=(6,)),
                       row(BASE + 1, draft_version="v2", drafted=(10, 6), accepted=(8, 5), draft_length=3, num_steps=10)])
    v2, v1 = survival(config, "engine", BASE - 60, BASE + 60)
    assert (v1.version, v1.tried, v1.kept, v1.steps) == ("v1", [60, 24, 18], [30, 18, 12], 60)
    assert (v2.version, v2.tried, v2.kept, v2.newest) == ("v2", [10, 6], [8, 5], BASE + 1)


def test_positions_that_were_never_tried_are_as_likely_as_the_one_before() -> None:
    chances = Survival("v1", [100_000, 50_000], [50_000, 40_000]).chances(4)
    assert chances == pytest.approx((0.5, 0.4, 0.32, 0.256), rel=1e-3)
    assert Survival("new").chances(2) == pytest.approx((PRIOR_RATE, PRIOR_RATE**2))
