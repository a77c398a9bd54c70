"""The static draft and its successors replayed on the same held-out windows: what each would have accepted. Knows the lake and drafts.

A regime is the time from one drift to the next: an adaptation says since when traffic counted as drifted (`focus_since` of its draft). The
windows captured in a regime stand for all of its traffic, also for that after the adaptation, when nothing is captured any more.
Only prompts that no draft was ever trained on are replayed, each once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import SignalWindow
from tide_pipeline.errors import LakeError, NotEnoughSignals, TideError

if TYPE_CHECKING:
    from tide_pipeline.capture.reader import WindowStates
    from tide_pipeline.models.eagle3 import Eagle3Draft
    from tide_pipeline.training.target_head import TargetHead

Floats = NDArray[np.float64]
Place = tuple[str, int]            # workload, number of its regime

LEAST_PROMPTS = 4                  # of a regime, to judge it
MOST_PROMPTS = 32                  # the newest


@dataclass(frozen=True)
class Regimes:
    """Since when each workload's traffic was another than before, in ascending order."""

    starts: Mapping[str, Sequence[float]]

    def of(self, workload: str, at: float) -> int:
        """0 is before the first drift."""
        return bisect_right(list(self.starts.get(workload, ())), at)


@dataclass(frozen=True)
class Accepted:
    """One draft on the windows of one regime. P = prompts, L = draft length."""

    accepted_PL: Floats            # steps that accepted the token at each position
    steps_P: Floats

    def shares(self, weights_P: Floats) -> Floats:
        """[L]: chance that a step accepts the token at each position and all before it."""
        found: Floats = (weights_P @ self.accepted_PL) / max(float(weights_P @ self.steps_P), 1e-9)
        return found

    @property
    def length(self) -> float:
        """Tokens per step, bonus token included."""
        return float(1.0 + self.shares(np.ones(len(self.steps_P))).sum())


def replay_regimes(config: TideConfig, drafts: Mapping[str, Path], wanted: Mapping[Place, set[str]], regimes: Regimes, since: float,
                   until: float) -> dict[Place, dict[str, Accepted]]:
    """For each place the drafts that were asked for, on the same prompts. Places with too few of them, and drafts that can't be loaded, are
    left out; everything is where there is no lake.
    """
    from tide_pipeline.models.checkpoint import load_draft
    from tide_pipeline.training.target_head import target_head_of

    found: dict[Place, dict[str, Accepted]] = {}
    if not wanted:
        return found
    try:
        head = target_head_of(config)
        windows = held_out_windows(config, head.digest, regimes, since, until)
    except (TideError, OSError):                           # an engine whose weights are elsewhere, a lake that holds nothing
        return found
    loaded: dict[str, Eagle3Draft] = {}
    for place, versions in wanted.items():
        states = _states(windows.get(place, []), head)
        if len(states) < LEAST_PROMPTS:
            continue
        for version in sorted(versions & drafts.keys()):
            if version not in loaded:
                try:
                    loaded[version] = load_draft(drafts[version], head.shape, head.identity)
                except (TideError, OSError):
                    continue
            found.setdefault(place, {})[version] = _accepted(loaded[version], head, states, config.gate.draft_length)
    return found


def held_out_windows(config: TideConfig, engine_digest: str, regimes: Regimes, since: float,
                     until: float) -> dict[Place, list[SignalWindow]]:
    """The newest window of each held-out prompt, by workload and regime, from the first token of its request on."""
    from tide_pipeline.capture.reader import list_windows
    from tide_pipeline.training.data import MIN_ROWS, is_held_out

    found: dict[Place, dict[str, SignalWindow]] = {}
    for window in list_windows(config.state.signals, config.target, since=since, engine_digest=engine_digest).windows:
        if window.closed_at > until or window.start_pos or window.num_rows < max(MIN_ROWS, window.num_prompt_tokens):
            continue
        if is_held_out(window.prompt_digest, config.training.eval_share):
            place = window.workload, regimes.of(window.workload, window.closed_at)
            found.setdefault(place, {}).setdefault(window.prompt_digest, window)
    return {place: list(by_prompt.values())[:MOST_PROMPTS] for place, by_prompt in found.items()}


def _states(windows: Sequence[SignalWindow], head: TargetHead) -> list[WindowStates]:
    from tide_pipeline.capture.reader import read_states
    from tide_pipeline.training.data import misfit

    try:
        return [s for s in read_states(windows, on_skip=lambda _window, _why: None) if not misfit(s, head)]
    except (LakeError, NotEnoughSignals):
        return []


def _accepted(draft: Eagle3Draft, head: TargetHead, states: Sequence[WindowStates], draft_length: int) -> Accepted:
    from tide_pipeline.training.acceptance import replay

    found = list(replay(draft, head, states, draft_length))
    return Accepted(np.array([r.accepted for r in found]).reshape(len(found), draft_length), np.array([r.steps for r in found]))
