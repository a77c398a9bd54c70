"""Several processes train one draft: two on the CPU end where one does, and one that dies takes the run down in good order."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.fakes_training import engine_with_lake, random_draft
from tide_pipeline.config import TideConfig, TrainingSettings, override
from tide_pipeline.engine.memory import deal
from tide_pipeline.recipes import freeze
from tide_pipeline.training.average import Average
from tide_pipeline.training.data import find_windows, held_out_windows, read_fitting
from tide_pipeline.training.gradient import GradientMaker
from tide_pipeline.training.loop import train_draft
from tide_pipeline.training.loss import LossWeights
from tide_pipeline.training.optimizer import Optimizer
from tide_pipeline.training.selection import Selection
from tide_pipeline.training.shares import Shares
from tide_pipeline.training.snapshot import load_snapshot
from tide_pipeline.training.target_head import target_head_of
from tide_pipeline.training.team import Team, team_of_environment

PATIENCE_S = 300
EXACT = {"time_budget_s": 0.0, "max_steps": 40, "eval_every_steps": 20, "eval_windows": 4, "eval_share": 0.25, "checkpoint_every_s": 0.0,
         "window_rows": 48, "autocast": False, "nice": 1, "batch_windows": 4, "ema_decay": 0.9, "train_lm_head": True}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TideConfig:
    return engine_with_lake(tmp_path_factory.mktemp("team"), EXACT, de=16, py=4)


def start(config: TideConfig, folder: Path, **over: object) -> subprocess.Popen[str]:
    freeze(override(config, {"training": {"train_devices": ["cpu", "cpu"], **over}}), folder / "two.toml")
    command = [sys.executable, "-m", "tide_pipeline.training", "--workload", "de", "--out", str(folder / "draft"), "--json"]
    return subprocess.Popen(command, env={**os.environ, "TIDE_CONFIG": str(folder / "two.toml")}, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def born(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "provenance.json").read_text()))


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([t.float().flatten() for _, t in sorted(load_file(folder / "model.safetensors").items()) if t.is_floating_point()])


@pytest.fixture(scope="module")
def one(config: TideConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    train_draft(config, workload="de", out_dir=folder)
    return folder


@pytest.fixture(scope="module")
def two(config: TideConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    process = start(config, folder)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    assert json.loads(out)["steps"] == EXACT["max_steps"]                        # printed once, by the first process
    return folder / "draft"


@pytest.fixture(scope="module")
def way(config: TideConfig, one: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """How far the weights of `one` have gone."""
    folder = tmp_path_factory.mktemp("begin")
    train_draft(override(config, {"training": {"max_steps": 1, "learning_rate": 0.0}}), workload="de", out_dir=folder)
    return float((weights(one) - weights(folder)).norm())


def test_two_processes_end_with_the_weights_of_one(one: Path, two: Path, way: float) -> None:
    """Within rounding: gradients are added up in another order, and the draft is stored in bf16."""
    assert born(two)["processes"] == 2
    assert (weights(one) - weights(two)).norm() < 0.01 * way
    ends = [json.loads((folder / "checkpoint.json").read_text())["acceptance_length"] for folder in (one, two)]
    assert ends[0] == pytest.approx(ends[1], abs=0.02)


def test_each_of_two_keeps_half_of_the_optimizer_and_of_the_average(one: Path, two: Path) -> None:
    """AdamW's two moments and the average of every trained tensor, four bytes each; and a count of steps for each tensor."""
    draft = load_file(one / "model.safetensors")
    sizes = [t.numel() for name, t in draft.items() if name not in ("d2t", "t2d")]
    whole = 3 * 4 * sum(sizes) + 4 * len(sizes)
    assert born(one)["kept_bytes"] == [whole]
    assert sum(born(two)["kept_bytes"]) == whole and max(born(two)["kept_bytes"]) < 0.52 * whole


def test_when_one_process_is_killed_the_others_end_and_any_team_can_go_on(config: TideConfig, one: Path, two: Path, way: float,
                                                                          tmp_path: Path) -> None:
    process = start(config, tmp_path)
    snapshot, deadline = tmp_path / "draft" / "resume.safetensors", time.monotonic() + PATIENCE_S
    while not snapshot.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    team = psutil.Process(process.pid).children()
    assert len(team) == 2
    team[1].send_signal(signal.SIGKILL)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130 and "was killed (SIGKILL): the same command goes on from the last snapshot" in err
    assert "TrainingFailed: another process of this run has gone" in err and "Traceback" not in err
    assert not any(member.is_running() for member in team)
    found = load_snapshot(tmp_path / "draft")
    assert found is not None and 0 < found[0].step < EXACT["max_steps"]
    shutil.copytree(tmp_path / "draft", tmp_path / "alone")

    process = start(config, tmp_path)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    assert weights(tmp_path / "draft").equal(weights(two))                       # a team of the same size: to the last bit

    train_draft(config, workload="de", out_dir=tmp_path / "alone")
    assert born(tmp_path / "alone")["processes"] == 1
    assert (weights(one) - weights(tmp_path / "alone")).norm() < 0.01 * way


def test_tensors_are_dealt_out_evenly_and_to_everyone_alike() -> None:
    assert deal([5, 9, 4, 4, 2], 2) == [1, 0, 1, 0, 1]
    assert deal([3, 2], 1) == [0, 0] and deal([3, 2], 4) == [0, 1]


@pytest.mark.parametrize(("rank", "kinds"), [(0, ["AdamW", "Muon"]), (1, ["Muon"])])
def test_who_owns_no_tensor_of_a_kind_has_no_optimizer_for_it(rank: int, kinds: list[str]) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4, bias=False))          # 16, 4, 16
    shares = Shares(net, Team(rank, 2))
    optimizer = Optimizer(shares.mine, TrainingSettings(optimizer="muon"))
    assert [type(part).__name__ for part in optimizer.parts] == kinds


def test_a_process_without_a_held_out_window_counts_as_the_others_do(config: TideConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of another width in one of the processes end gloo with SIGABRT: four of them did, with three windows held out."""
    head, sent = target_head_of(config), []
    draft = random_draft(head.shape)
    maker = GradientMaker(draft, head, LossWeights(1, 0.0, 1.0), 48, autocast=False, parts=1)
    selection = Selection(maker, Average({}, 0.0), 3, Shares(draft, Team()))
    monkeypatch.setattr(Team, "add_up", lambda self, tensors: sent.extend((t.dtype, t.shape) for t in tensors))
    held_out = read_fitting(held_out_windows(find_windows(config, "de", head.digest), 4), head)
    assert held_out and selection.acceptance_on([]) == 1.0 and selection.acceptance_on(held_out) >= 1.0
    assert len(sent) == 2 and sent[0] == sent[1]


def test_alone_a_team_talks_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    team, gradient = team_of_environment((), "cpu"), torch.ones(2)
    team.add_up([gradient])
    team.wait()
    assert team.is_first and team.device == "cpu" and gradient.tolist() == [1, 1] and team.latest(1.5, 2) == [1.5, 2]
    assert team.everyones("me") == ["me"] and team.mine([1, 2]) == [1, 2]
    assert team_of_environment(("cuda:3",), "cpu").device == "cuda:3"
    assert Team(1, 3).mine(list(range(7))) == [1, 4]
