"""`python -m tide_pipeline.training` as a process: its exit codes, its files, signals, and Dagster Pipes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg
import pytest

from tests.fakes_training import captured, open_target, tiny_engine, to_lake
from tide_pipeline.config import TideConfig, override
from tide_pipeline.recipes import freeze, load
from tide_pipeline.training.loop import train_draft
from tide_pipeline.training.snapshot import load_snapshot

PATIENCE_S = 300                   # a busy machine starts a process slowly


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("main")
    config: TideConfig = override(tiny_engine(root), {"training": {
        "time_budget_s": 2.0, "eval_share": 0.25, "eval_every_s": 0.5, "window_rows": 48, "nice": 1, "min_prompts": 4}})
    to_lake(config, captured(open_target(config), "de", 16))
    freeze(config, root / "tide.toml")
    return root / "tide.toml"


def start(settings: Path, out: Path, *more: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tide_pipeline.training", "--workload", "de", "--out", str(out), *more]
    return subprocess.Popen(command, env={**os.environ, "TIDE_CONFIG": str(settings), **environment}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_it_trains_and_prints_the_record(settings: Path, tmp_path: Path) -> None:
    process = start(settings, tmp_path, "--json", "--seed", "3")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    record = json.loads(out)
    assert record["path"] == str(tmp_path) and record["acceptance_length"] >= 1 and record["steps"] > 0
    assert "training: step" in err and "tokens/s" in err
    assert json.loads((tmp_path / "progress.json").read_text())["stage"] == "done"
    assert json.loads((tmp_path / "provenance.json").read_text())["seed"] == 3


def test_a_signal_checkpoints_and_the_same_command_goes_on(settings: Path, tmp_path: Path) -> None:
    process = start(settings, tmp_path, "--time-budget-s", "6")
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if (tmp_path / "progress.json").exists() and json.loads((tmp_path / "progress.json").read_text())["stage"] == "training":
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130 and "goes on" in err
    assert (tmp_path / "resume.safetensors").exists() and not (tmp_path / "model.safetensors").exists()


def test_killed_without_a_word_it_goes_on_to_the_very_weights(settings: Path, tmp_path: Path) -> None:
    """SIGKILL at whatever instruction it is at; by steps, the end is that of a run nobody killed."""
    config = override(load(file=settings), {"training": {"time_budget_s": 0.0, "max_steps": 40, "eval_every_steps": 8, "ema_decay": 0.9,
                                                         "checkpoint_every_s": 0.0}})
    freeze(config, tmp_path / "exact.toml")
    whole = train_draft(config, workload="de", out_dir=tmp_path / "whole")
    process = start(tmp_path / "exact.toml", tmp_path / "cut")
    deadline = time.monotonic() + PATIENCE_S
    while not (tmp_path / "cut" / "resume.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(random.random() * 0.2)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "cut" / "model.safetensors").exists()
    found = load_snapshot(tmp_path / "cut")
    assert found is not None and 0 < found[0].step < 40
    assert train_draft(config, workload="de", out_dir=tmp_path / "cut").digest == whole.digest
    assert not list((tmp_path / "cut").glob(".*"))


def test_failures_say_why_and_exit_with_one(settings: Path, tmp_path: Path) -> None:
    process = start(settings, tmp_path, "--champion", str(tmp_path / "none"))
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1 and "CheckpointError" in err and "Traceback" not in err


@pytest.mark.filterwarnings("ignore::dagster.PreviewWarning")
def test_under_dagster_pipes_it_reports_numbers(settings: Path, tmp_path: Path) -> None:
    with dg.instance_for_test() as instance:
        @dg.asset
        def draft_checkpoint(context: dg.AssetExecutionContext, pipes: dg.PipesSubprocessClient) -> object:
            command = [sys.executable, "-m", "tide_pipeline.training", "--workload", "de", "--out", str(tmp_path / "out")]
            return pipes.run(command=command, context=context, env={"TIDE_CONFIG": str(settings)}).get_materialize_result()

        result = dg.materialize([draft_checkpoint], resources={"pipes": dg.PipesSubprocessClient()}, instance=instance)
    metadata = result.asset_materializations_for_node("draft_checkpoint")[0].metadata
    assert metadata["steps"].value > 0 and metadata["acceptance_length"].value >= 1.0
    assert metadata["tokens_per_s"].value > 0 and metadata["loss"].value > 0 and metadata["start_acceptance_length"].value >= 1.0
