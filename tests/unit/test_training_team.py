"""Several processes train one draft: two on the CPU end where one does, and one that dies takes the run down in good order."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.fakes_training import engine_with_lake
from tide_pipeline.config import TideConfig, override
from tide_pipeline.recipes import freeze
from tide_pipeline.training.loop import train_draft
from tide_pipeline.training.snapshot import load_snapshot
from tide_pipeline.training.team import Team, team_of_environment

PATIENCE_S = 300
EXACT = {"time_budget_s": 0.0, "max_steps": 20, "eval_every_steps": 10, "eval_share": 0.25, "window_rows": 48, "autocast": False, "nice": 1,
         "batch_windows": 4, "ema_decay": 0.9, "train_lm_head": True}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TideConfig:
    return engine_with_lake(tmp_path_factory.mktemp("team"), EXACT, de=16, py=4)


def start(config: TideConfig, folder: Path, **over: object) -> subprocess.Popen[str]:
    freeze(override(config, {"training": {"train_devices": ["cpu", "cpu"], **over}}), folder / "two.toml")
    command = [sys.executable, "-m", "tide_pipeline.training", "--workload", "de", "--out", str(folder / "draft"), "--json"]
    return subprocess.Popen(command, env={**os.environ, "TIDE_CONFIG": str(folder / "two.toml")}, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([t.float().flatten() for _, t in sorted(load_file(folder / "model.safetensors").items()) if t.is_floating_point()])


def test_two_processes_end_with_the_weights_of_one(config: TideConfig, tmp_path: Path) -> None:
    """Within rounding: gradients are added up in another order, and the draft is stored in bf16."""
    process = start(config, tmp_path)
    train_draft(config, workload="de", out_dir=tmp_path / "one")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    record = json.loads(out)                                                     # printed once, by the first process
    born = json.loads((tmp_path / "draft" / "provenance.json").read_text())
    assert record["steps"] == 20 and born["processes"] == 2
    begun = override(config, {"training": {"max_steps": 1, "learning_rate": 0.0}})
    train_draft(begun, workload="de", out_dir=tmp_path / "begin")
    one, two, begin = (weights(tmp_path / name) for name in ("one", "draft", "begin"))
    assert (one - two).norm() < 0.01 * (one - begin).norm()
    assert record["acceptance_length"] == pytest.approx(json.loads((tmp_path / "one" / "checkpoint.json").read_text())["acceptance_length"],
                                                        abs=0.02)


def test_when_one_process_is_killed_the_others_end_and_the_run_can_go_on(config: TideConfig, tmp_path: Path) -> None:
    process = start(config, tmp_path, max_steps=100_000, checkpoint_every_s=0.0)
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
    assert found is not None and found[0].step > 0


def test_alone_a_team_talks_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    team, gradient = team_of_environment((), "cpu"), torch.ones(2)
    team.add_up([gradient])
    team.wait()
    assert team.is_first and team.device == "cpu" and gradient.tolist() == [1, 1] and team.latest(1.5, 2) == [1.5, 2]
    assert team.everyones("me") == ["me"] and team.mine([1, 2]) == [1, 2]
    assert team_of_environment(("cuda:3",), "cpu").device == "cuda:3"
    assert Team(1, 3).mine(list(range(7))) == [1, 4]
