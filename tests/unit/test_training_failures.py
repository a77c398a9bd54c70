"""What goes wrong while training is said with its cause: broken windows, a rate too high, too little memory, settings without sense."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.fakes_training import captured, engine_with_lake, open_target, random_draft, to_lake
from tide_pipeline.config import TideConfig, TrainingSettings, override
from tide_pipeline.errors import SettingsError, TrainingFailed
from tide_pipeline.training import gradient
from tide_pipeline.training.batches import Sampler, labelled_rows
from tide_pipeline.training.checks import check
from tide_pipeline.training.gradient import GradientMaker
from tide_pipeline.training.loop import train_draft
from tide_pipeline.training.loss import LossWeights
from tide_pipeline.training.target_head import target_head_of
from tide_pipeline.training.team import Team

EXACT = {"time_budget_s": 0.0, "max_steps": 12, "eval_every_steps": 6, "eval_share": 0.25, "window_rows": 48, "learning_rate": 5e-3,
         "warmup_steps": 3, "autocast": False}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TideConfig:
    return engine_with_lake(tmp_path_factory.mktemp("failures"), EXACT, de=24, py=12)


@pytest.mark.parametrize("where", ["taps", "final"])
def test_a_window_that_is_not_finite_is_named_alone(config: TideConfig, tmp_path: Path, where: str) -> None:
    config = override(config, {"state_dir": str(tmp_path / "state"), "training": {"replay_share": 0.0, "max_steps": 100}})
    windows = captured(open_target(config), "de", 24)
    bad = next(w for w in windows if w.window.request_id == "de-0-3")
    states = bad.taps_TG if where == "taps" else bad.final_TD
    assert states is not None
    states[5, 7] = float("nan")
    to_lake(config, windows)
    with pytest.raises(TrainingFailed, match=r"at step \d+ .*caused by request de-0-3, window at position 0 \(\S+ row \d+\), whose states "
                                             r"are not finite: delete") as error:
        train_draft(config, workload="de", out_dir=tmp_path / "out")
    assert str(error.value).count("request de-") == 1


def test_an_exploding_loss_stops_the_run_and_names_its_window(config: TideConfig, tmp_path: Path) -> None:
    config = override(config, {"training": {"learning_rate": 50.0, "max_steps": 200, "clip_norm": 0.0}})
    with pytest.raises(TrainingFailed, match=r"caused by request (de|py)-\d-\d+, window.*lower training\.learning_rate"):
        train_draft(config, workload="de", out_dir=tmp_path)


def test_a_gradient_that_is_not_finite_does_not_reach_the_weights(config: TideConfig, tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss can be fine where its gradient is not."""
    from tide_pipeline.training.run import Run

    real, seen = GradientMaker.run, []

    def poisoned(self: GradientMaker, rows: gradient.Rows, num_rows: Sequence[int]) -> torch.Tensor:
        loss = real(self, rows, num_rows)
        seen.append(self)
        if len(seen) == 4:
            grad = self.draft.fc.weight.grad
            assert grad is not None
            grad[0, 0] = float("inf")
        return loss

    monkeypatch.setattr(GradientMaker, "run", poisoned)
    updates: list[int] = []
    monkeypatch.setattr(Run, "log", lambda self, *_: updates.append(1))
    with pytest.raises(TrainingFailed, match=r"gradient norm (inf|nan) at step 3"):
        train_draft(config, workload="de", out_dir=tmp_path)
    assert all(bool(torch.isfinite(p).all()) for p in seen[0].draft.parameters())


def test_a_window_on_another_process_is_named_by_all(config: TideConfig, tmp_path: Path) -> None:
    class OtherIsToBlame(Team):
        def everyones(self, text: str) -> list[str]:
            return [text, json.dumps([[math.nan, "request far-away"], [2.0, "request innocent"]])]

    config = override(config, {"training": {"learning_rate": 50.0, "max_steps": 200, "clip_norm": 0.0}})
    with pytest.raises(TrainingFailed, match="request far-away") as error:
        train_draft(config, workload="de", out_dir=tmp_path, team=OtherIsToBlame())
    assert "innocent" not in str(error.value)


# --- memory ------------------------------------------------------------------------------------------------------

class SmallDevice:
    """Stands where `ttt_loss` does: a batch of more than `rows` rows, or every one, is too large for it."""

    def __init__(self, rows: int, error: Exception) -> None:
        self.real, self.rows, self.error = gradient.ttt_loss, rows, error
        self.sizes: list[int] = []

    def __call__(self, draft: object, batch: object, *rest: object) -> torch.Tensor:
        size = len(batch.labels_BT)  # type: ignore[attr-defined]
        self.sizes.append(size)
        if size > self.rows:
            raise self.error
        return self.real(draft, batch, *rest)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")])
def test_out_of_memory_halves_the_micro_batch_and_goes_on(config: TideConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                          error: Exception) -> None:
    config = override(config, {"training": {"batch_windows": 4}})
    wanted = train_draft(override(config, {"training": {"accumulate": 4}}), workload="de", out_dir=tmp_path / "parts")
    device = SmallDevice(1, error)
    monkeypatch.setattr(gradient, "ttt_loss", device)
    made = train_draft(config, workload="de", out_dir=tmp_path / "small")
    assert device.sizes[:7] == [4, 2, 1, 1, 1, 1, 1] and set(device.sizes[2:]) == {1}, "it is not tried again in every step"
    assert made.digest == wanted.digest


def test_a_row_that_never_fits_says_what_to_lower(config: TideConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient, "ttt_loss", SmallDevice(0, torch.OutOfMemoryError("CUDA out of memory\nmany lines")))
    with pytest.raises(TrainingFailed, match=r"one row of 48 tokens .*\(CUDA out of memory\): lower training\.window_rows"):
        train_draft(config, workload="de", out_dir=tmp_path)


def test_other_errors_are_not_taken_for_too_little_memory(config: TideConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient, "ttt_loss", SmallDevice(0, RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes"):
        train_draft(config, workload="de", out_dir=tmp_path)


@pytest.mark.parametrize("vocabulary", [None, 40])
def test_micro_batches_add_up_to_the_batch(config: TideConfig, vocabulary: int | None) -> None:
    target, head = open_target(config), target_head_of(config)
    windows = captured(target, "de", 6, prompt=5, output=17) + captured(target, "py", 6, prompt=3, output=40, seed=1)
    rows = Sampler(windows, [], 6, 48, 0.0, 3).slices(0)
    ids = None if vocabulary is None else torch.arange(vocabulary)
    gradients, losses = [], []
    for parts in (1, 2, 4, 6):
        draft = random_draft(target.shape, vocabulary=ids)
        maker = GradientMaker(draft, head, LossWeights(3, 0.5, 0.9, 0.2), 48, False, parts)
        losses.append(float(maker.run(rows, labelled_rows(rows, 3))))
        gradients.append(torch.cat([p.grad.flatten() for p in maker.trained if p.grad is not None]))
    for loss, grad in zip(losses, gradients, strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-5)
        torch.testing.assert_close(grad, gradients[0], rtol=1e-4, atol=1e-5)


def test_accumulated_steps_end_with_the_weights_of_whole_ones(config: TideConfig) -> None:
    target, head, ends = open_target(config), target_head_of(config), []
    windows = captured(target, "de", 8)
    for parts in (1, 4):
        maker = GradientMaker(random_draft(target.shape), head, LossWeights(2, 0.5, 0.9), 40, False, parts)
        for step in range(20):
            rows = Sampler(windows, [], 4, 40, 0.0, 0).slices(step)
            maker.clear()
            maker.run(rows, labelled_rows(rows, 2))
            with torch.no_grad():
                for p in maker.trained:
                    assert p.grad is not None
                    p -= 1e-2 * p.grad
        ends.append(torch.cat([p.detach().flatten() for p in maker.trained]))
    start = torch.cat([p.detach().flatten() for p in random_draft(target.shape).parameters()])
    assert (ends[0] - ends[1]).norm() < 1e-4 * (ends[0] - start).norm()


# --- settings ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("over", "says"), [
    ({"optimizer": "sgd"}, r"training\.optimizer is 'sgd': set it to one of adamw, muon"),
    ({"schedule": "step"}, r"training\.schedule is 'step': set it to one of linear"),
    ({"accept_share": 1.2}, "from 0 to 1"),
    ({"ema_decay": 1.0}, "from 0 to below 1"),
    ({"accumulate": 3, "batch_windows": 2}, r"from 1 to batch_windows \(2\)"),
    ({"batch_windows": 3}, "a multiple of the number of processes, 2"),
])
def test_settings_without_sense_are_refused(over: dict[str, object], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        check(dataclasses.replace(TrainingSettings(), **over), processes=2)  # type: ignore[arg-type]
