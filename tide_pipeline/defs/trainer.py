"""How the trainer is started: its settings, its command line, the devices it sees, and what a bad exit means."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

import dagster as dg
from dagster._core.errors import DagsterPipesExecutionError  # not exported in 1.13

from tide_pipeline.config import TideConfig, override
from tide_pipeline.contracts import EngineBuild
from tide_pipeline.defs.adaptation import Adaptation
from tide_pipeline.defs.limits import AWAY_S, AWAY_TRIES
from tide_pipeline.errors import SettingsError
from tide_pipeline.recipes import freeze
from tide_pipeline.training.launch import AWAY, STOPPED

__all__ = ["DagsterPipesExecutionError", "after_a_failed_training", "last_words_of", "times_waited", "training_command",
           "training_environment"]

CRASHED_S = 1.0                            # before one that crashed is started again


def training_command(adaptation: Adaptation, champion: EngineBuild | None) -> list[str]:
    """The same line by hand trains the same draft."""
    asked = adaptation.request()
    command = [sys.executable, "-m", "tide_pipeline.training", "--workload", asked.workload, "--out", str(adaptation.draft)]
    if champion is not None:
        command += ["--champion", f"{champion.path}/draft", "--parent", champion.draft_version]
    if asked.focus_since > 0:
        command += ["--focus-since", str(asked.focus_since)]
    if asked.since or asked.until:
        command += ["--since", asked.since, "--until", asked.until]
    return command


def training_environment(config: TideConfig, adaptation: Adaptation, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Settings frozen beside the draft, and a process that sees its own device only, as number 0; with `train_devices` it sees all."""
    device = config.training.device
    if any(name.startswith("cuda") for name in config.training.train_devices):
        freeze(config, adaptation.folder / "settings.toml")
        return {"TIDE_CONFIG": str(adaptation.folder / "settings.toml")}
    on_gpu = device.startswith("cuda")
    file = adaptation.folder / "settings.toml"
    freeze(override(config, {"training": {"device": "cuda"}}) if on_gpu else config, file)
    return {"TIDE_CONFIG": str(file), "CUDA_VISIBLE_DEVICES": _visible(device, environment) if on_gpu else ""}


def after_a_failed_training(error: DagsterPipesExecutionError, last_words: str, waited: int = 0) -> Exception:
    """A trainer that was killed goes on from its snapshot, once; one without storage waits for it; another reason would be given again.

    `waited`: tries of the step that ended for want of storage. Dagster counts every try of a step, whatever it ended for.
    """
    code = int(str(error).rsplit(" ", 1)[-1])
    if code == AWAY and waited < AWAY_TRIES:
        return dg.RetryRequested(max_retries=AWAY_TRIES, seconds_to_wait=AWAY_S)
    if code < 0 or code == STOPPED:
        return dg.RetryRequested(max_retries=1 + waited, seconds_to_wait=CRASHED_S)
    return dg.Failure(last_words or f"the trainer ended with exit code {code}: see the end of this step's stderr", allow_retries=False)


def times_waited(instance: dg.DagsterInstance, run_id: str) -> int:
    """How often training, a run's first step, was tried again because the storage was away."""
    retries = instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_UP_FOR_RETRY)
    return sum(event.get_dagster_event().step_retry_data.seconds_to_wait != CRASHED_S for event in retries)


def last_words_of(instance: dg.DagsterInstance, run_id: str) -> str:
    """The exception that the trainer closed Pipes with, without its stack; "" when there was none."""
    for event in reversed(instance.all_logs(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT)):
        error = event.get_dagster_event().engine_event_data.error
        if error is not None:
            return error.message.strip().splitlines()[0]
    return ""


def _visible(device: str, environment: Mapping[str, str]) -> str:
    """"cuda:1" is the second of the devices that we see ourselves."""
    index = int(device.partition(":")[2] or 0)
    ours = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if ours and index >= len(ours):
        raise SettingsError(f"training.device is {device!r}, but CUDA_VISIBLE_DEVICES shows {len(ours)}: cuda:{len(ours) - 1} is the last")
    return ours[index] if ours else str(index)
