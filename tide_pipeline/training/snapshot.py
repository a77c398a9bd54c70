"""A training run on disk, so that it can be killed at any step and go on. safetensors and JSON only: nothing is unpickled.

    run.json             what the run is: workload, settings, parent, the windows it reads (references, prompt digests and digests of their
                         states, which find them again after compaction; no tokens)
    resume.safetensors   weights, their average, optimizer state, best weights so far, states of the random number generators; counters
                         (step = position in the data, budget used, micro-batches, evaluations without a gain) and the curve in its header
    metrics.jsonl        the curve, for MLflow and for people
    checkpoint.json      the record of the finished draft; the last thing a run writes
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tide_pipeline.contracts import DraftCheckpoint, SignalWindow, from_dict
from tide_pipeline.errors import TrainingFailed
from tide_pipeline.provenance import write_atomic
from tide_pipeline.training.data import WindowSplit

RUN, RESUME, METRICS, CHECKPOINT = "run.json", "resume.safetensors", "metrics.jsonl", "checkpoint.json"
_PARTS = ("focus", "replay", "focus_held_out", "replay_held_out")


@dataclass
class Counters:
    """Everything about a run that is not a tensor and changes."""

    step: int = 0
    elapsed_s: float = 0.0
    rows: int = 0
    best_acceptance: float = 0.0
    best_step: int = -1
    best_source: str = ""          # live or averaged
    stale_evaluations: int = 0     # since the best one
    parts: int = 1                 # micro-batches in a batch; memory may have asked for more
    evaluated_step: int = -1
    start_acceptance: float = 0.0
    last_acceptance: float = 0.0
    first_loss: float = 0.0        # a loss far above it is an explosion
    mean_loss: float = 0.0         # exponential mean
    curve: list[dict[str, Any]] = field(default_factory=list)


def save_snapshot(folder: Path, counters: Counters, groups: dict[str, dict[str, Tensor]]) -> None:
    """Write `resume.safetensors` (tensors named `<group>:<name>`) and the curve."""
    tensors = {f"{group}:{name}": t.detach().cpu().contiguous() for group, named in groups.items() for name, t in named.items()}
    header = {"counters": json.dumps(dataclasses.asdict(counters))}
    write_atomic(folder / RESUME, save(tensors, metadata=header))
    write_metrics(folder, counters.curve)


def load_snapshot(folder: Path) -> tuple[Counters, dict[str, dict[str, Tensor]]] | None:
    """What `save_snapshot` wrote last; None when there is nothing. Raises TrainingFailed when it is damaged."""
    file = folder / RESUME
    if not file.is_file():
        return None
    groups: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(file, framework="pt") as tensors:
            counters = Counters(**json.loads(tensors.metadata()["counters"]))
            for key in tensors.keys():  # noqa: SIM118 - not a dict
                group, name = key.split(":", 1)
                groups.setdefault(group, {})[name] = torch.clone(tensors.get_tensor(key))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise TrainingFailed(f"{file} can't be resumed from ({error}): remove {folder} and train again") from error
    return counters, groups


def write_metrics(folder: Path, curve: list[dict[str, Any]]) -> None:
    """One JSON object per line."""
    write_atomic(folder / METRICS, "".join(json.dumps(point) + "\n" for point in curve).encode())


def save_run(folder: Path, facts: dict[str, Any], split: WindowSplit) -> None:
    """Pin what a run is before its first step."""
    windows = {name: [dataclasses.asdict(w) for w in part] for name, part in zip(_PARTS, split.parts, strict=True)}
    (folder / CHECKPOINT).unlink(missing_ok=True)              # of an earlier run in the same folder
    run = {"facts": facts, "skipped": dict(split.skipped), "windows": windows}
    write_atomic(folder / RUN, (json.dumps(run, indent=2, default=str) + "\n").encode(), mode=0o600)


def load_run(folder: Path, facts: dict[str, Any]) -> WindowSplit | None:
    """The windows of an unfinished run in `folder`; None when there is none.

    Raises:
        TrainingFailed: the unfinished run is another one than `facts` describe.
    """
    file = folder / RUN
    if not file.is_file():
        return None
    try:
        run = json.loads(file.read_text())
        parts = [[from_dict(SignalWindow, w) for w in run["windows"][name]] for name in _PARTS]
        split = WindowSplit(parts[0], parts[1], parts[2], parts[3], Counter(run["skipped"]))
        found = run["facts"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise TrainingFailed(f"{file} is damaged ({error}): remove {folder} and train again") from error
    differ = _differing(found, json.loads(json.dumps(facts)))
    if differ:
        raise TrainingFailed(f"{folder} holds an unfinished run with other {', '.join(differ)}: remove it, or use another folder")
    return split


def read_checkpoint(folder: Path) -> DraftCheckpoint:
    return from_dict(DraftCheckpoint, json.loads((folder / CHECKPOINT).read_text()))


def finished(folder: Path, facts: dict[str, Any]) -> bool:
    """Whether the run in `folder` was killed after its last write, before it had tidied up; that is done now."""
    done = (folder / CHECKPOINT).is_file() and load_run(folder, facts) is not None
    if done:
        finish(folder)
    return done


def finish(folder: Path) -> None:
    """Remove what only an unfinished run needs, half-written files of killed ones included."""
    for name in (RESUME, RUN):
        (folder / name).unlink(missing_ok=True)
    for torn in [*folder.glob(".*.json*.*"), *folder.glob(".*.safetensors.*")]:
        torn.unlink(missing_ok=True)


def random_states() -> dict[str, Tensor]:
    """Of torch's generators. Training draws nothing from them (a batch depends on seed and step); kept so that it may."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_states(states: dict[str, Tensor]) -> None:
    """Take back what `random_states` gave."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _differing(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Names of facts, and of single settings, that are not the same."""
    names = []
    for key, value in wanted.items():
        if isinstance(value, dict) and isinstance(found.get(key), dict):
            names += [f"{key}.{name}" for name in value if found[key].get(name) != value[name]]
        elif found.get(key) != value:
            names.append(key)
    return names
