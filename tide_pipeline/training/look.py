"""One look at every window of a run before its first step, a row group at a time. Knows windows and the engine; knows no batches.

It tells which windows can be read at all, so that the draws of a run never change; how large each channel is; and which tokens there are.
When a run begins, a window that can't be read is skipped and counted. When it is gone on with, all its windows must be there: without
one of them the batches would be others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tide_pipeline.capture.reader import Identity, WindowStates, identity
from tide_pipeline.contracts import SignalWindow
from tide_pipeline.errors import NotEnoughSignals, TrainingFailed
from tide_pipeline.training.data import WindowSplit, misfit
from tide_pipeline.training.places import GONE, OnSkip, WindowReader
from tide_pipeline.training.target_head import TargetHead


@dataclass
class Look:
    """What was seen."""

    windows: WindowSplit               # that can be read, oldest first
    squares_G: Tensor                  # float64: mean square of each channel, mean over the training windows
    counts_V: Tensor                   # how often each token occurs in the training windows
    kept: dict[Identity, WindowStates] = field(default_factory=dict)     # states of the training windows, if all windows fit


def state_bytes(window: SignalWindow, head: TargetHead) -> int:
    """Memory that a window's states take at most: taps and final state in bf16, its tokens, a rejection per row."""
    vectors = len(head.spec.capture_layers) + int(head.spec.soft_targets)
    return window.num_rows * (2 * vectors * head.shape.hidden_size + 8 + 8) + 8


def look_through(split: WindowSplit, head: TargetHead, reader: WindowReader, room_bytes: float) -> Look:
    """Begin a run: keep what can be read, and count the rest in `skipped`.

    Raises:
        NotEnoughSignals: nothing readable is left to train on, or to hold out.
    """
    skipped = Counter(split.skipped)
    found = _look(split, head, reader, room_bytes, lambda _, reason: skipped.update([reason]))
    found.windows.skipped.update(skipped)
    if not found.windows.focus or not found.windows.focus_held_out:
        raise NotEnoughSignals(f"{len(found.windows.focus)} readable windows to train on and {len(found.windows.focus_held_out)} held out; "
                               f"skipped: {dict(skipped)}. Run `tide signals verify`, or capture again")
    return found


def look_again(split: WindowSplit, head: TargetHead, reader: WindowReader, room_bytes: float, folder: Path) -> Look:
    """Go on with a run: its windows in their order, wherever they lie now.

    Raises:
        TrainingFailed: one of them was deleted, has expired, or can't be read.
    """
    lost: Counter[str] = Counter()
    parts = []
    for part in split.parts:
        present, gone = reader.locate(part)
        parts.append(present)
        lost[GONE] += len(gone)
    here = WindowSplit(parts[0], parts[1], parts[2], parts[3])
    found = _look(here, head, reader, room_bytes, lambda _, reason: lost.update([reason]), in_order=True)
    found.windows.skipped.update(split.skipped)
    if lost.total():
        raise TrainingFailed(lost_windows(lost, sum(map(len, split.parts)), f"the run in {folder}"))
    return found


def lost_windows(lost: Counter[str], of: int, run: str) -> str:
    """What to say when windows of a run can't be read any more."""
    reasons = "; ".join(f"{count} {reason}" for reason, count in lost.items() if count)
    return (f"{lost.total()} of the {of} windows that {run} began with can't be read ({reasons}), so that it can't end as it began: "
            "remove its folder and train again, on the windows that are left")


def _look(split: WindowSplit, head: TargetHead, reader: WindowReader, room_bytes: float, on_skip: OnSkip, in_order: bool = False) -> Look:
    train = split.focus + split.replay
    keep = sum(state_bytes(window, head) for part in split.parts for window in part) <= room_bytes
    width, V = len(head.spec.capture_layers) * head.shape.hidden_size, head.shape.vocab_size
    look = Look(WindowSplit([], [], [], []), torch.zeros(width, dtype=torch.float64), torch.zeros(V, dtype=torch.int64))
    training = {identity(window) for window in train}
    places: dict[Identity, SignalWindow] = {}
    for states in reader.read([window for part in split.parts for window in part], on_skip):
        key = identity(states.window)
        if reason := misfit(states, head):
            on_skip(states.window, reason)
            continue
        places[key] = states.window
        if key in training:
            look.squares_G += states.taps_TG.float().square().mean(0).nan_to_num(0.0, 0.0, 0.0)
            look.counts_V += torch.bincount(states.token_ids, minlength=V)
            if keep:
                look.kept[key] = states
    for part, into in zip(split.parts, look.windows.parts, strict=True):
        here = [places[identity(window)] for window in part if identity(window) in places]
        into += here if in_order else _oldest_first(here)
    look.squares_G /= max(len(look.windows.train), 1)
    return look


def _oldest_first(windows: Sequence[SignalWindow]) -> list[SignalWindow]:
    return sorted(windows, key=lambda w: (w.closed_at, w.uri, w.row))
