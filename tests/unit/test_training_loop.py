"""A whole cycle on a tiny engine: it learns, resumes exactly, stops with a reason, and leaves a draft that loads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.fakes_training import batch_of, captured, engine_with_lake, open_target
from tide_pipeline.config import TideConfig, override
from tide_pipeline.errors import EngineMismatch, TrainingFailed
from tide_pipeline.models.checkpoint import digest_draft, load_draft
from tide_pipeline.training.loop import TrainingInterrupted, train_draft
from tide_pipeline.training.optimizer import rate_factor
from tide_pipeline.training.progress import TrainProgress
from tide_pipeline.training.target_head import target_head_of

EXACT = {"time_budget_s": 0.0, "max_steps": 30, "eval_every_steps": 10, "eval_share": 0.25, "window_rows": 48, "learning_rate": 5e-3,
         "warmup_steps": 3, "autocast": False}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TideConfig:
    return engine_with_lake(tmp_path_factory.mktemp("loop"), EXACT, de=24, py=12)


def stop_after(step: int) -> tuple[Callable[[], bool], list[int]]:
    """A `should_stop` that fires at its `step`-th question, one question a step."""
    asked: list[int] = []

    def should_stop() -> bool:
        asked.append(1)
        return len(asked) == step
    return should_stop, asked


def test_a_cycle_learns_and_leaves_a_draft_with_its_birth_certificate(config: TideConfig, tmp_path: Path) -> None:
    seen: list[TrainProgress] = []
    config = override(config, {"training": {"max_steps": 150}})
    made = train_draft(config, workload="de", out_dir=tmp_path / "a", progress=seen.append)
    assert made.acceptance_length > 1.3 and made.digest == digest_draft(tmp_path / "a") and made.steps == 150
    head = target_head_of(config)
    load_draft(tmp_path / "a", head.shape, head.identity)
    born = json.loads((tmp_path / "a" / "provenance.json").read_text())
    assert born["workload"] == "de" and born["parent"] == "" and sum(map(len, born["shards"].values())) == made.num_windows
    assert "token_ids" not in json.dumps(born)
    curve = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert curve[0]["step"] == 0 and curve[-1]["acceptance_length"] > curve[0]["acceptance_length"]
    assert seen[0].stage == "loading" and seen[-1].stage == "done" and seen[-1].share == 1.0
    assert not (tmp_path / "a" / "resume.safetensors").exists()

    warm = train_draft(override(config, {"training": {"max_steps": 5}}), workload="de", out_dir=tmp_path / "b", champion=tmp_path / "a")
    assert warm.parent == made.digest[:12]
    assert json.loads((tmp_path / "b" / "provenance.json").read_text())["start_acceptance_length"] == pytest.approx(
        made.acceptance_length, abs=0.1)                                         # the champion as saved, in bf16
    assert warm.acceptance_length >= made.acceptance_length - 0.1                # never worse than its start on the same windows


def test_an_unfinished_run_of_other_settings_is_not_taken_up(config: TideConfig, tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted):
        train_draft(config, workload="de", out_dir=tmp_path, should_stop=lambda: True)
    with pytest.raises(TrainingFailed, match=r"unfinished run with other settings\.seed"):
        train_draft(override(config, {"training": {"seed": 5}}), workload="de", out_dir=tmp_path)
    (tmp_path / "resume.safetensors").write_bytes(b"torn")
    with pytest.raises(TrainingFailed, match="can't be resumed"):
        train_draft(config, workload="de", out_dir=tmp_path)


def test_a_reduced_vocabulary_is_rebuilt_from_the_windows(config: TideConfig, tmp_path: Path) -> None:
    small = override(config, {"training": {"draft_vocab_size": 24, "max_steps": 10}})
    train_draft(small, workload="py", out_dir=tmp_path / "py")
    train_draft(small, workload="de", out_dir=tmp_path / "de", champion=tmp_path / "py")
    full = override(config, {"training": {"max_steps": 10}})
    wide = train_draft(full, workload="de", out_dir=tmp_path / "wide", champion=tmp_path / "py")
    head = target_head_of(config)
    assert load_draft(tmp_path / "de", head.shape).lm_head.weight.shape == (24, 32)
    assert load_draft(Path(wide.path), head.shape).lm_head.weight.shape == (64, 32)


def test_a_champion_of_another_target_is_refused(config: TideConfig, tmp_path: Path) -> None:
    short = override(config, {"training": {"max_steps": 2}})
    train_draft(short, workload="de", out_dir=tmp_path / "a")
    named = json.loads((tmp_path / "a" / "config.json").read_text())
    named["tide"]["engine_digest"] = "0123"
    (tmp_path / "a" / "config.json").write_text(json.dumps(named))
    with pytest.raises(EngineMismatch, match="0123"):
        train_draft(short, workload="de", out_dir=tmp_path / "b", champion=tmp_path / "a")


def test_the_time_budget_ends_a_run_with_the_rate_at_zero(config: TideConfig, tmp_path: Path) -> None:
    timed = override(config, {"training": {"time_budget_s": 1.5, "max_steps": 1_000_000, "eval_every_steps": 0, "eval_every_s": 0.4,
                                           "checkpoint_every_s": 0.3}})
    made = train_draft(timed, workload="de", out_dir=tmp_path)
    assert 1.4 < made.train_s < 4 and 5 < made.steps < 1_000_000
    assert [rate_factor(s, share, 4) for s, share in ((0, 0.0), (3, 0.0), (9, 0.5), (9, 1.0))] == [0.25, 1.0, 0.5, 0.0]


def test_five_seeded_losses_are_those_on_record(config: TideConfig) -> None:
    """The golden: any change of alignment, masks, loss or sampler shows here."""
    from tests.fakes_training import random_draft
    from tide_pipeline.training.batches import Sampler
    from tide_pipeline.training.loss import LossWeights, ttt_loss

    golden = Path(__file__).parent.parent / "golden" / "training_losses.json"
    target = open_target(config)
    draft, optimizer_lr = random_draft(target.shape), 1e-2
    sampler = Sampler(captured(target, "de", 6), captured(target, "py", 3, seed=1), 2, 40, 0.4, 0)
    losses = []
    for step in range(5):
        loss = ttt_loss(draft, batch_of(sampler, step), target.embedding_VD, target.lm_head_VD, LossWeights(3, 0.5, 0.9))
        draft.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in draft.parameters():
                assert p.grad is not None
                p -= optimizer_lr * p.grad
        losses.append(loss.item())
    assert losses == pytest.approx(json.loads(golden.read_text()), rel=1e-4)


def test_progress_survives_a_reader_at_any_time(tmp_path: Path) -> None:
    from tide_pipeline.training.progress import FileViewer, LineViewer

    lines: list[str] = []
    viewer, printer = FileViewer(tmp_path / "progress.json", every_s=0.0), LineViewer(lines.append, every_s=60)
    for step in range(3):
        progress = TrainProgress("training", "de", step=step, acceptance=2.5, start_acceptance=1.7, time_left_s=30)
        viewer.show(progress)
        printer.show(progress)
        assert json.loads((tmp_path / "progress.json").read_text())["step"] == step
    printer.show(dataclasses.replace(progress, stage="saving"))
    assert len(lines) == 2 and "acceptance 2.50 (started at 1.70, best" in lines[0] and lines[1].startswith("saving")


def test_the_bar_shows_what_the_line_says() -> None:
    import io

    from rich.console import Console

    from tide_pipeline.training.progress import BarViewer

    screen = io.StringIO()
    bar = BarViewer(Console(file=screen, force_terminal=True, width=200))
    progress = TrainProgress("training", "de", step=12, share=0.25, loss=3.21, acceptance=2.5, best_acceptance=2.6, start_acceptance=1.7,
                             rows_per_s=1234.0, time_left_s=30)
    bar.show(progress)
    bar.close()
    assert progress.facts in screen.getvalue() and "25%" in screen.getvalue()
    assert progress.facts == "step 12, loss 3.210, acceptance 2.50 (started at 1.70, best 2.60), 1,234 tokens/s, 30 s left"
