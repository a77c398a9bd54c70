"""The static draft and its successors replayed on held-out windows near each moment: what each would have accepted. Knows lake and drafts.

Capture stores a tenth of all requests in any case and more after a change, so windows are sampled unevenly: each moment of a draft's
service is judged by the NEAREST windows in time that this draft served, not by all of them alike. Only prompts that no draft was ever
trained on are replayed; requests with the same prompt are drawn together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import SignalWindow
from tide_pipeline.errors import LakeError, TideError

if TYPE_CHECKING:
    from tide_pipeline.capture.reader import WindowStates
    from tide_pipeline.models.eagle3 import Eagle3Draft
    from tide_pipeline.training.target_head import TargetHead

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Line = tuple[str, str]             # workload, draft version that served

NEAREST = 12                       # windows that a moment is judged by
LEAST_PROMPTS = 4                  # of a line, to judge it at all
MOST_WINDOWS = 48                  # of a line, evenly over its time
REACH_S = 300.0                    # a moment further from any window is not judged; in long periods this share of them
REACH = 0.05


@dataclass(frozen=True)
class Accepted:
    """Two drafts on the same windows of one line, in order of time. W = windows, L = draft length."""

    at_W: Floats                   # Unix time
    prompt_W: Ints                 # windows of one prompt share a number, 0 .. prompts - 1
    served_WL: Floats              # steps of the draft that served which accepted the token at each position
    served_steps_W: Floats
    static_WL: Floats              # the same of the static draft
    static_steps_W: Floats

    @property
    def prompts(self) -> int:
        return int(self.prompt_W.max(initial=-1)) + 1

    def nearest(self, at: float, reach_s: float) -> Ints:
        """The windows that judge a moment; none where all are too far."""
        gap_W = np.abs(self.at_W - at)
        chosen: Ints = np.argsort(gap_W, kind="stable")[:NEAREST]
        return chosen if len(chosen) and gap_W[chosen[0]] <= reach_s else chosen[:0]


def shares(accepted_WL: Floats, steps_W: Floats, weights_SW: Floats) -> Floats:
    """[S, L]: chance that a step accepts the token at each position and all before it."""
    found: Floats = (weights_SW @ accepted_WL) / np.maximum(weights_SW @ steps_W, 1e-9)[:, None]
    return found


def replay_lines(config: TideConfig, drafts: Mapping[str, Path], static: str, lines: Sequence[Line], since: float,
                 until: float) -> dict[Line, Accepted]:
    """Lines with too few windows are left out, and those whose draft can't be loaded; all of them where there is no lake."""
    from tide_pipeline.training.target_head import target_head_of

    wanted = [line for line in lines if line[1] in drafts and static in drafts]
    if not wanted:
        return {}
    try:
        head = target_head_of(config)
        windows = held_out_windows(config, head.digest, since, until)
        first = _load(drafts[static], head)
    except (TideError, OSError):                           # an engine whose weights are elsewhere, a lake that holds nothing
        return {}
    found = {}
    for line in wanted:
        states = _states(windows.get(line, []), head)
        if len({s.window.prompt_digest for s in states}) < LEAST_PROMPTS:
            continue
        try:
            found[line] = _accepted(_load(drafts[line[1]], head), first, head, states, config.gate.draft_length)
        except (TideError, OSError):
            continue
    return found


def held_out_windows(config: TideConfig, engine_digest: str, since: float, until: float) -> dict[Line, list[SignalWindow]]:
    """Whole requests from their first token on, long enough for a step, thinned evenly."""
    from tide_pipeline.capture.reader import list_windows
    from tide_pipeline.training.data import MIN_ROWS, is_held_out

    found: dict[Line, list[SignalWindow]] = {}
    for window in list_windows(config.state.signals, config.target, since=since, engine_digest=engine_digest).windows:
        if window.closed_at > until or window.start_pos or window.num_rows < max(MIN_ROWS, window.num_prompt_tokens + 2):
            continue
        if is_held_out(window.prompt_digest, config.training.eval_share):
            found.setdefault((window.workload, window.draft_version), []).append(window)
    return {line: windows[:: -(-len(windows) // MOST_WINDOWS)] for line, windows in found.items()}


def _load(folder: Path, head: TargetHead) -> Eagle3Draft:
    from tide_pipeline.models.checkpoint import load_draft

    return load_draft(folder, head.shape, head.identity)


def _states(windows: Sequence[SignalWindow], head: TargetHead) -> list[WindowStates]:
    from tide_pipeline.capture.reader import read_states
    from tide_pipeline.training.data import misfit

    try:
        found = [s for s in read_states(windows, on_skip=lambda _window, _why: None) if not misfit(s, head)]
    except LakeError:
        return []
    return sorted(found, key=lambda s: s.window.closed_at)


def _accepted(served: Eagle3Draft, static: Eagle3Draft, head: TargetHead, states: Sequence[WindowStates], draft_length: int) -> Accepted:
    from tide_pipeline.training.acceptance import replay

    def steps_of(draft: Eagle3Draft) -> tuple[Floats, Floats]:
        found = list(replay(draft, head, states, draft_length))
        assert len(found) == len(states), "every window is long enough for a step"
        return np.array([r.accepted for r in found]), np.array([r.steps for r in found])

    _, prompt_W = np.unique([s.window.prompt_digest for s in states], return_inverse=True)
    return Accepted(np.array([s.window.closed_at for s in states]), prompt_W.reshape(-1).astype(np.int64), *steps_of(served),
                    *steps_of(static))
