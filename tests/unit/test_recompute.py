"""What recompute.py compares are the same batches: stored, read anew, and computed again by the target in either form. Nothing is timed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pocket_recipe import trained_network
from recompute import ReadingAnew, Recomputing, autocast_forward, only_from_the_start, served_forward
from training_run import open_run

from tests.fakes_training import engine_with_lake, open_target
from tide_pipeline.config import TideConfig
from tide_pipeline.engine_spec import load_engine_spec
from tide_pipeline.training.run import Run

TRAINING = {"time_budget_s": 0.0, "batch_windows": 2, "window_rows": 24, "min_prompts": 2, "eval_share": 0.3, "nice": 0, "autocast": False}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TideConfig:
    return engine_with_lake(tmp_path_factory.mktemp("recompute"), TRAINING, de=12, py=6)


def a_run(config: TideConfig, tmp_path: Path) -> Run:
    return open_run(config, "de", tmp_path / "draft")


def states_of(run: Run, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Taps and teacher rows that the batch of a step uses."""
    _, mine = run.stream.batch(step)
    cuts = [(cut.source, cut.start, cut.start + cut.rows) for row in mine for cut in row]
    return [(source.taps_TG[start:stop].float(), source.final_TD[start + 1 : stop + 1].float()) for source, start, stop in cuts]


def test_states_read_anew_are_the_stored_ones(config: TideConfig, tmp_path: Path) -> None:
    stored, anew = a_run(config, tmp_path), a_run(config, tmp_path)
    anew.stream = ReadingAnew(anew.stream, anew)
    for (taps, final), (taps_again, final_again) in zip(states_of(stored, 3), states_of(anew, 3), strict=True):
        assert torch.equal(taps, taps_again) and torch.equal(final, final_again)
    assert [stored.step() for _ in range(3)] == [anew.step() for _ in range(3)]


@pytest.mark.parametrize(("way", "tolerance"), [("as served", 0.01), ("bf16 autocast", 0.05)])
def test_recomputed_states_are_the_stored_ones_but_for_rounding(config: TideConfig, tmp_path: Path, way: str, tolerance: float) -> None:
    stored, fresh = a_run(config, tmp_path), a_run(config, tmp_path)
    spec = load_engine_spec(config.engine_dir)
    forward = served_forward(open_target(config)) if way == "as served" else autocast_forward(
        trained_network(config.engine_dir / spec.model, torch.device("cpu")), spec.capture_layers, torch.device("cpu"))
    fresh.stream = Recomputing(fresh.stream, forward, fresh)
    for ours, again in zip(states_of(stored, 5), states_of(fresh, 5), strict=True):
        for x, y in zip(ours, again, strict=True):
            assert x.shape == y.shape and float((x - y).norm()) <= tolerance * float(x.norm())
    assert fresh.step() == pytest.approx(stored.step(), rel=tolerance)


def test_windows_that_begin_inside_a_text_are_left_out(config: TideConfig, tmp_path: Path) -> None:
    run = a_run(config, tmp_path)
    before = len(run.stream.sampler.focus)
    assert only_from_the_start(run) == 0 and len(run.stream.sampler.focus) == before
