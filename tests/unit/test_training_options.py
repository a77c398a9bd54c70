"""Averaged weights, schedules over the budget, and early stopping: what each does, and that what is exported is what was measured."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.fakes_training import engine_with_lake, open_target, random_draft
from tide_pipeline.config import TideConfig, override
from tide_pipeline.models.checkpoint import load_draft
from tide_pipeline.training import run as run_module
from tide_pipeline.training.acceptance import acceptance_length, replay
from tide_pipeline.training.average import Average
from tide_pipeline.training.data import find_windows, held_out_windows, read_fitting
from tide_pipeline.training.loop import TrainingInterrupted, train_draft
from tide_pipeline.training.optimizer import Optimizer, rate_factor
from tide_pipeline.training.shares import Shares
from tide_pipeline.training.target_head import target_head_of
from tide_pipeline.training.team import Team

EXACT = {"time_budget_s": 0.0, "max_steps": 40, "eval_every_steps": 10, "eval_share": 0.25, "window_rows": 48, "learning_rate": 5e-3,
         "warmup_steps": 3, "autocast": False}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TideConfig:
    return engine_with_lake(tmp_path_factory.mktemp("options"), EXACT, de=24, py=6)


def provenance(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "provenance.json").read_text())
    return found


def test_the_average_is_an_exponential_one_with_a_short_beginning(config: TideConfig) -> None:
    draft = random_draft(open_target(config).shape)
    draft.lm_head.weight.requires_grad_(False)
    trained = Shares(draft, Team()).mine
    average, wanted = Average(trained, 0.5), draft.fc.weight.detach().clone()
    for step in range(12):
        with torch.no_grad():
            draft.fc.weight.add_(torch.randn_like(draft.fc.weight))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * draft.fc.weight.detach()
    torch.testing.assert_close(average.held["fc.weight"], wanted)
    assert "lm_head.weight" not in average.held                                   # it is not trained
    assert Average(trained, 0.0).held == {}


def test_averaged_weights_are_exported_when_they_are_better(config: TideConfig, tmp_path: Path) -> None:
    """A rate that is much too high and never falls: the average accepts more than any of its points."""
    wild = {"learning_rate": 0.1, "schedule": "constant", "ema_decay": 0.95, "max_steps": 60}
    made = train_draft(override(config, {"training": wild}), workload="de", out_dir=tmp_path)
    born = provenance(tmp_path)
    evaluations = [p for p in born["curve"] if "acceptance_length" in p]  # type: ignore[attr-defined]
    assert born["best_weights"] == "averaged"
    assert made.acceptance_length == max(max(p["acceptance_length"], p.get("averaged_acceptance_length", 0.0)) for p in evaluations)
    head = target_head_of(config)
    split = find_windows(config, "de", head.digest)
    held_out = [s for s in read_fitting(held_out_windows(split, len(split.focus_held_out)), head) if s.window.workload == "de"]
    served = load_draft(tmp_path, head.shape, head.identity)
    measured = acceptance_length(replay(served, head, held_out, config.gate.draft_length))
    assert measured == pytest.approx(made.acceptance_length, abs=0.1)             # in bf16, as it is served


def test_measuring_the_average_leaves_the_training_as_it_is(config: TideConfig, tmp_path: Path) -> None:
    """The live weights of a run with averages are those of one without; here both export their last live ones."""
    ends = []
    for decay in (0.0, 0.5):
        seen: list[torch.Tensor] = []
        run_config = override(config, {"training": {"ema_decay": decay, "max_steps": 20}})
        real = run_module.Run.finish

        def finish(self: run_module.Run, parent: str, seen: list[torch.Tensor] = seen, real: object = real) -> object:
            seen.append(self.draft.fc.weight.detach().clone())
            return real(self, parent)  # type: ignore[operator]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_module.Run, "finish", finish)
            train_draft(run_config, workload="de", out_dir=tmp_path / str(decay))
        ends += seen
    assert ends[0].equal(ends[1])


def test_what_is_exported_lies_a_little_back_towards_the_champion(config: TideConfig, tmp_path: Path) -> None:
    """Also of a run that was stopped and gone on with; what is recorded is measured on what is exported."""
    champion, head = tmp_path / "champion", target_head_of(config)
    train_draft(override(config, {"training": {"max_steps": 5}}), workload="de", out_dir=champion)
    ends = {}
    for share in (0.0, 0.25):
        folder, asked = tmp_path / str(share), itertools.count(1)
        run_config = override(config, {"training": {"champion_share": share}})
        with pytest.raises(TrainingInterrupted):
            train_draft(run_config, workload="de", out_dir=folder, champion=champion, should_stop=lambda asked=asked: next(asked) == 15)
        made = train_draft(run_config, workload="de", out_dir=folder, champion=champion)
        ends[share] = load_draft(folder, head.shape, head.identity).fc.weight
        windows = held_out_windows(find_windows(config, "de", head.digest), 99)
        held_out = [s for s in read_fitting(windows, head) if s.window.workload == "de"]
        measured = acceptance_length(replay(load_draft(folder, head.shape, head.identity), head, held_out, config.gate.draft_length))
        assert measured == pytest.approx(made.acceptance_length, abs=0.1)         # in bf16, as it is served
    begun = load_draft(champion, head.shape, head.identity).fc.weight
    assert (ends[0.0] - begun).norm() > 0.05 * begun.norm()
    torch.testing.assert_close(ends[0.25], torch.lerp(ends[0.0], begun, 0.25), rtol=0.01, atol=1e-3)
    assert provenance(tmp_path / "0.25")["trained_acceptance_length"] == provenance(tmp_path / "0.0")["acceptance_length"]


def test_patience_ends_a_run_that_does_not_gain(config: TideConfig, tmp_path: Path) -> None:
    train_draft(override(config, {"training": {"learning_rate": 0.0, "patience": 2}}), workload="de", out_dir=tmp_path)
    born = provenance(tmp_path)
    assert (born["steps"], born["stopped_early"], born["best_step"]) == (20, True, 0)


@pytest.mark.parametrize(("schedule", "factors"), [
    ("linear", [1.0, 0.75, 0.5, 0.25, 0.0]), ("cosine", [1.0, 0.8536, 0.5, 0.1464, 0.0]), ("hold", [1.0, 1.0, 1.0, 0.625, 0.0]),
    ("constant", [1.0] * 5)])
def test_schedules(schedule: str, factors: list[float]) -> None:
    assert [rate_factor(9, share / 4, 4, schedule) for share in range(5)] == pytest.approx(factors, abs=1e-4)
    assert rate_factor(0, 0.0, 4, schedule) == 0.25 and rate_factor(9, 1.5, 4, schedule) == factors[-1]


def test_the_rate_follows_the_spent_share_of_the_time(config: TideConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves 0.25 s whenever it is looked at; the rate is what is left of the budget."""
    ticks, factors = itertools.count(), []
    monkeypatch.setattr(run_module, "time", SimpleNamespace(monotonic=lambda: next(ticks) * 0.25))
    monkeypatch.setattr(Optimizer, "step", lambda self, factor: factors.append(factor))
    timed = {"schedule": "linear", "time_budget_s": 5.0, "max_steps": 10_000, "eval_every_steps": 0, "eval_every_s": 1e9, "warmup_steps": 1,
             "checkpoint_every_s": 1e9}
    train_draft(override(config, {"training": timed}), workload="de", out_dir=tmp_path)
    assert factors == pytest.approx([1 - 0.05 * step for step in range(20)])

    factors.clear()
    asked = itertools.count(1)
    with pytest.raises(TrainingInterrupted, match="step 8"):
        train_draft(override(config, {"training": timed}), workload="de", out_dir=tmp_path / "cut", should_stop=lambda: next(asked) == 8)
    made = train_draft(override(config, {"training": timed}), workload="de", out_dir=tmp_path / "cut")
    assert factors == pytest.approx([1 - 0.05 * step for step in range(20)]), "the spent budget is kept"
    assert (made.steps, made.train_s) == (20, 5.0)
