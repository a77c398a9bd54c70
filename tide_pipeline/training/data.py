"""Which captured windows a training run uses, and for what. Knows the lake's reader; knows no draft.

    focus    windows of the drifted workload      train | held out, split by prompt
    replay   every other workload, and the windows shipped with the engine (engines/<name>/replay): against forgetting

A prompt is held out by its digest alone, so that every request with it stays on one side in every later cycle: traffic repeats
prompts, and the gate must not judge a draft on one that it or any of its ancestors was trained on. Prompts that differ in one
token are two: those that share a long beginning (turns of one conversation) can still fall on both sides.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tide_pipeline.capture.reader import WindowStates, list_windows, read_states
from tide_pipeline.config import TideConfig, TrainingSettings
from tide_pipeline.contracts import SignalWindow
from tide_pipeline.errors import EngineMismatch, NotEnoughSignals
from tide_pipeline.training.span import ALWAYS, Span

if TYPE_CHECKING:
    from tide_pipeline.training.target_head import TargetHead

EARLIER = " (earlier)"             # appended to the tag of a drifted workload's windows from before the drift
MIN_ROWS = 8                       # of a window: shorter ones hold no chain worth training on
LOOK_THROUGH = 25                  # times max_windows: that many of the lake's newest windows are looked at, whatever it holds


@dataclass(frozen=True)
class WindowSplit:
    """Windows by use, newest first as found, oldest first once looked through (look.py). Nothing of their states is in memory."""

    focus: list[SignalWindow]
    replay: list[SignalWindow]
    focus_held_out: list[SignalWindow]
    replay_held_out: list[SignalWindow]
    skipped: Counter[str] = field(default_factory=Counter)      # reason -> windows or shards

    @property
    def parts(self) -> tuple[list[SignalWindow], list[SignalWindow], list[SignalWindow], list[SignalWindow]]:
        """In the order of the fields."""
        return self.focus, self.replay, self.focus_held_out, self.replay_held_out

    @property
    def train(self) -> list[SignalWindow]:
        return self.focus + self.replay

    @property
    def num_rows(self) -> int:
        """Token rows trained on."""
        return sum(w.num_rows for w in self.train)


def is_held_out(prompt_digest: str, eval_share: float) -> bool:
    """Whether a prompt is kept for evaluation: for ever, on every machine. Any text will do as a digest."""
    return int.from_bytes(hashlib.sha256(prompt_digest.encode()).digest()[:8], "big") < eval_share * 2**64


def split_windows(windows: Iterable[SignalWindow], workload: str, settings: TrainingSettings) -> WindowSplit:
    """Sort windows into the four sets. Each workload keeps its newest; replay shares `max_windows` evenly between workloads."""
    newest = sorted(windows, key=lambda w: w.closed_at, reverse=True)
    workloads = {w.workload for w in newest}
    room = {name: settings.max_windows if name == workload else settings.max_windows // max(len(workloads - {workload}), 1)
            for name in workloads}
    split = WindowSplit([], [], [], [])
    for w in newest:
        if w.num_rows < MIN_ROWS:
            split.skipped[f"shorter than {MIN_ROWS} rows"] += 1
        elif room[w.workload] <= 0:
            split.skipped["older than the newest max_windows"] += 1
        else:
            room[w.workload] -= 1
            held_out = is_held_out(w.prompt_digest, settings.eval_share)
            (split.focus_held_out if held_out else split.focus).append(w) if w.workload == workload else (
                split.replay_held_out if held_out else split.replay).append(w)
    return split


def find_windows(config: TideConfig, workload: str, engine_digest: str, shipped: Path | None = None, *,
                 focus_since: float = 0.0, span: Span = ALWAYS) -> WindowSplit:
    """The windows of `workload` and of all others, in the lake and in the shipped replay set.

    Windows of `workload` closed before `focus_since` (Unix seconds) are what it looked like before it drifted: they count as
    another workload, named `<workload> (earlier)`, for replay and for the gate's floor. Of the lake, only windows closed in `span` are
    trained on; what is held out is the same for every span.

    Raises:
        NotEnoughSignals: no lake, or too few prompts of `workload` to train on and to hold out.
        EngineMismatch: there are windows, but every one was made by another engine.
    """
    shipped = shipped if shipped is not None else config.engine_dir / "replay"
    most = config.training.max_windows
    found, skipped, stale = _list(config.state.signals, config.target, engine_digest, most)
    always: list[SignalWindow] = []
    if shipped.is_dir():
        always, more_skipped, more_stale = _list(shipped, config.target, engine_digest, most)
        found, skipped, stale = found + always, skipped + more_skipped, stale + more_stale
    if stale and not found:
        raise EngineMismatch(f"all {stale} captured windows of {config.target!r} come from another engine build than {engine_digest} "
                             "(the target or its captured layers changed): capture again with the engine that serves now")
    split = split_windows([_dated(w, workload, focus_since) for w in found], workload, config.training)
    if not span.is_all:
        within, skipped, _ = _list(config.state.signals, config.target, engine_digest, most, span)
        past = split_windows([_dated(w, workload, focus_since) for w in within + always], workload, config.training)
        split = replace(past, focus_held_out=split.focus_held_out, replay_held_out=split.replay_held_out)
    split.skipped.update(skipped)
    if stale:
        split.skipped["made by another engine"] += stale
    train, held_out = (len({w.prompt_digest for w in part}) for part in (split.focus, split.focus_held_out))
    need = config.training.min_prompts
    if train + held_out < need or not train or not held_out:
        when = "" if span.is_all else f" captured {span}"
        raise NotEnoughSignals(f"{train} prompts of workload {workload!r}{when} to train on and {held_out} held out (rows: "
                               f"{sum(w.num_rows for w in split.focus)}), at least {need} different prompts and one of each are "
                               "needed: serve more traffic of this workload with capture on" + _others(found, workload))
    return split


def held_out_windows(split: WindowSplit, per_workload: int) -> list[SignalWindow]:
    """Up to `per_workload` held-out windows of each workload: the newest, but one of every prompt before a second of any."""
    taken: Counter[str] = Counter()
    chosen = []
    for w in _prompts_in_turn(split.focus_held_out) + _prompts_in_turn(split.replay_held_out):
        taken[w.workload] += 1
        if taken[w.workload] <= per_workload:
            chosen.append(w)
    return chosen


def read_fitting(windows: Sequence[SignalWindow], head: TargetHead) -> list[WindowStates]:
    """States of windows, oldest first, without those that do not fit the engine."""
    found = [states for states in read_states(windows) if not misfit(states, head)]
    return sorted(found, key=lambda s: (s.window.closed_at, s.window.uri, s.window.row))


def misfit(states: WindowStates, head: TargetHead) -> str:
    """Why states are not of this engine; "" when they are."""
    width, with_final = len(head.spec.capture_layers) * head.shape.hidden_size, head.spec.soft_targets
    fits = states.taps_TG.shape[1] == width and (states.final_TD is not None) == with_final
    return "" if fits else "taps or final states do not fit the engine"


def _prompts_in_turn(windows: Sequence[SignalWindow]) -> list[SignalWindow]:
    """The first window of every (workload, prompt), then the second of each, and so on; else in the order given."""
    seen: Counter[tuple[str, str]] = Counter()
    turns = []
    for w in windows:
        turns.append(seen[w.workload, w.prompt_digest])
        seen[w.workload, w.prompt_digest] += 1
    return [windows[i] for i in sorted(range(len(windows)), key=turns.__getitem__)]


def _dated(window: SignalWindow, workload: str, focus_since: float) -> SignalWindow:
    if window.workload != workload or window.closed_at >= focus_since:
        return window
    return replace(window, workload=workload + EARLIER)


def _list(root: Path | str, target: str, engine_digest: str, most: int,
          span: Span = ALWAYS) -> tuple[list[SignalWindow], Counter[str], int]:
    """Twice as many of each workload as a split can use: the drifted one is two, before and after."""
    index = list_windows(root, target, engine_digest=engine_digest, max_each=2 * most, among=LOOK_THROUGH * most,
                         since=span.since or None, until=span.until if span.until < math.inf else None)
    return index.windows, Counter(f"unreadable shard: {reason}" for _, reason in index.skipped), index.other_engines


def _others(windows: Sequence[SignalWindow], workload: str) -> str:
    counts = Counter(w.workload for w in windows if w.workload != workload)
    return f"; other workloads in the lake: {dict(counts)}" if counts else ""
