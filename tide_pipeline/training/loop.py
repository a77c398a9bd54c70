"""One training cycle: windows and a champion in, a better draft checkpoint out. Knows no bar, no Dagster and no MLflow.

Runs until its time or its steps are used up, whichever comes first, with the learning rate annealed to zero at that point, or
until acceptance has stopped rising (`patience`). A run killed at any step goes on from its last snapshot; with `time_budget_s = 0`
and `eval_every_steps` it ends with the weights of an unkilled one, to the last bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tide_pipeline.config import TideConfig, TrainingSettings
from tide_pipeline.contracts import DraftCheckpoint
from tide_pipeline.errors import TrainingFailed
from tide_pipeline.models.checkpoint import digest_draft, load_draft
from tide_pipeline.models.eagle3 import Eagle3Draft
from tide_pipeline.training.checks import check
from tide_pipeline.training.data import find_windows
from tide_pipeline.training.look import Look, look_again, look_through
from tide_pipeline.training.places import WindowReader, window_reader
from tide_pipeline.training.progress import TrainProgress
from tide_pipeline.training.run import Report, Run, TrainingInterrupted
from tide_pipeline.training.scale import channel_scale, for_raw_taps
from tide_pipeline.training.snapshot import finished, load_run, read_checkpoint, save_run
from tide_pipeline.training.span import ALWAYS, Span
from tide_pipeline.training.stream import MB
from tide_pipeline.training.target_head import TargetHead, target_head_of
from tide_pipeline.training.team import Team
from tide_pipeline.training.vocabulary import frequent_tokens, new_draft, with_vocabulary

__all__ = ["TrainingInterrupted", "train_draft"]

FREE = ("cache_mb", "train_devices")       # settings that change nothing about the draft, or its rounding: a run may go on under others


def train_draft(config: TideConfig, *, workload: str, out_dir: Path, champion: Path | None = None, parent: str = "",
                focus_since: float = 0.0, span: Span = ALWAYS, progress: Report = lambda _: None,
                should_stop: Callable[[], bool] = lambda: False, team: Team | None = None) -> DraftCheckpoint:
    """Train a draft for `workload`, from the `champion` folder or from scratch; go on with an unfinished run in `out_dir`.

    Windows of the workload from before `focus_since` (Unix seconds) are replay, not focus; those closed outside `span` are not trained
    on at all. `team` is of the processes that train together, all of which call this alike; only the first one reports and writes.

    Raises:
        SettingsError: a training setting has a value that makes no sense.
        NotEnoughSignals: too few windows, with the numbers.
        EngineMismatch: windows or champion belong to another engine.
        TrainingFailed: NaN or exploding loss, another unfinished run in `out_dir`, or windows of this one that were deleted meanwhile.
        TrainingInterrupted: `should_stop` said so; a checkpoint was written.
    """
    team = team or Team(device=config.training.device)
    settings = check(config.training, team.size)
    progress = progress if team.is_first else lambda _: None
    torch.set_num_threads(settings.threads)
    progress(TrainProgress("loading", workload))
    head = target_head_of(config)
    origin = digest_draft(champion) if champion else ""
    parent = parent or origin[:12]
    facts = {"workload": workload, "engine_digest": head.digest, "parent": parent, "champion": origin, "focus_since": focus_since,
             **span.facts, "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k not in FREE}}
    if team.latest(float(team.is_first and finished(out_dir, facts)))[0]:
        return read_checkpoint(out_dir)
    reader = window_reader(config)
    look = _look(config, workload, head, reader, out_dir, facts, team, span)
    draft = first_draft(champion, head, look, settings)
    run = Run(config, workload, out_dir, head.to(team.device), look, reader, draft, team, progress, should_stop,
              {"parent_digest": origin, "focus_since": focus_since, **span.facts})
    run.resume()
    run.train()
    return run.finish(parent)


def _look(config: TideConfig, workload: str, head: TargetHead, reader: WindowReader, out_dir: Path, facts: dict[str, Any],
          team: Team, span: Span) -> Look:
    """At the same windows in every process, and every time a run is taken up: the first one pins in the folder those it could read."""
    room_bytes = config.training.cache_mb * MB
    pinned, look = load_run(out_dir, facts) if team.is_first else None, None
    if team.is_first and pinned is None:
        split = find_windows(config, workload, head.digest, focus_since=facts["focus_since"], span=span)
        look = look_through(split, head, reader, room_bytes)
        save_run(out_dir, facts, look.windows)
    team.wait()
    if look is not None:
        return look
    pinned = pinned or load_run(out_dir, facts)
    if pinned is None:
        raise TrainingFailed(f"no run.json in {out_dir}, which another process of this run wrote: all of them need the same folder")
    return look_again(pinned, head, reader, room_bytes, out_dir)


def first_draft(champion: Path | None, head: TargetHead, look: Look, settings: TrainingSettings) -> Eagle3Draft:
    """The draft to begin with."""
    torch.manual_seed(settings.seed)
    keep = settings.draft_vocab_size
    before = load_draft(champion, head.shape, head.identity) if champion else None
    known_V = before.t2d if before is not None else None
    target_ids = frequent_tokens(look.counts_V, keep, known_V) if 0 < keep < head.shape.vocab_size else None
    if before is None:
        draft = new_draft(head, target_ids)
        for_raw_taps(draft, channel_scale(look.squares_G))                      # its random fc is meant for inputs of unit size
        return draft
    return with_vocabulary(before, head, target_ids)
