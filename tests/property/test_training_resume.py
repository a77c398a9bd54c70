"""A run stopped or killed at any step ends with the weights of one that was not, to the last bit."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.fakes_training import engine_with_lake
from tide_pipeline.config import TideConfig, override
from tide_pipeline.training import run as run_module
from tide_pipeline.training.loop import TrainingInterrupted, train_draft

STEPS = 14
EXACT = {"time_budget_s": 0.0, "max_steps": STEPS, "eval_every_steps": 4, "eval_windows": 4, "eval_share": 0.25, "window_rows": 48,
         "learning_rate": 5e-3, "warmup_steps": 3, "checkpoint_every_s": 1e9, "ema_decay": 0.9}
KINDS = {"adamw": {}, "muon": {"optimizer": "muon", "autocast": False, "schedule": "cosine"},
         "parts": {"accumulate": 2, "train_lm_head": True, "draft_vocab_size": 40}}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TideConfig:
    return engine_with_lake(tmp_path_factory.mktemp("resume"), EXACT, de=16, py=4)


@pytest.fixture(scope="module")
def unkilled(config: TideConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, over in KINDS.items():
        train_draft(override(config, {"training": over}), workload="de", out_dir=folders[kind])
    return folders


def same_end(a: Path, b: Path) -> None:
    one, two = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert all(one[name].equal(two[name]) for name in one)
    curves = [[{k: v for k, v in json.loads(line).items() if k in ("step", "acceptance_length", "averaged_acceptance_length")}
               for line in (folder / "metrics.jsonl").read_text().splitlines() if "acceptance_length" in line] for folder in (a, b)]
    assert curves[0] == curves[1]
    assert {p.name for p in b.iterdir()} == {"checkpoint.json", "config.json", "metrics.jsonl", "model.safetensors", "provenance.json"}


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(kind=st.sampled_from(sorted(KINDS)), stops=st.lists(st.integers(1, STEPS - 1), min_size=1, max_size=3))
def test_stopped_at_any_steps(config: TideConfig, unkilled: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, kind: str,
                              stops: list[int]) -> None:
    """Each stop is counted from where the run was taken up."""
    folder, config = tmp_path_factory.mktemp("cut"), override(config, {"training": KINDS[kind]})
    for after in stops:
        asked: list[int] = []

        def should_stop(asked: list[int] = asked, after: int = after) -> bool:
            asked.append(1)
            return len(asked) == after
        with contextlib.suppress(TrainingInterrupted):
            train_draft(config, workload="de", out_dir=folder, should_stop=should_stop)
    train_draft(config, workload="de", out_dir=folder)
    same_end(unkilled[kind], folder)


class Killed(BaseException):
    """What no code of ours handles."""


@pytest.mark.parametrize(("name", "call"), [("save_snapshot", 1), ("save_snapshot", 9), ("write_metrics", 3), ("save_draft", 1),
                                            ("write_json", 1), ("finish", 1)])
def test_dead_at_any_write(config: TideConfig, unkilled: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str,
                           call: int) -> None:
    """Dying instead of, or right after, a write; the next process goes on from what is on disk."""
    real, calls = getattr(run_module, name), []

    def dying(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(run_module, name, dying)
    config = override(config, {"training": {"checkpoint_every_s": 0.0}})           # after every step
    with pytest.raises(Killed):
        train_draft(config, workload="de", out_dir=tmp_path)
    monkeypatch.undo()
    train_draft(config, workload="de", out_dir=tmp_path)
    same_end(unkilled["adamw"], tmp_path)


def test_a_finished_run_that_was_not_tidied_up_is_not_trained_again(config: TideConfig, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(folder: Path) -> None:
        (folder / "resume.safetensors").unlink()
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run_module, "finish", dying)
        train_draft(config, workload="de", out_dir=tmp_path)
    monkeypatch.setattr(run_module.Run, "step", lambda self: pytest.fail("it trained again"))
    made = train_draft(config, workload="de", out_dir=tmp_path)
    assert made.steps == STEPS and not (tmp_path / "run.json").exists()
