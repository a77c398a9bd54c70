"""Offline acceptance: the steps that the engine would make with a draft, counted along text that was captured. Knows no files.

Anchor row r has the true taps g_r and the token x_{r+1} after it; the draft chains tokens for x_{r+2}, x_{r+3}, ... With n of them
accepted the step emits n + 1 tokens and the next anchor is r + n + 1. The first anchor is the last prompt row, num_prompt_tokens - 1 (its
next token is the first one generated). As in the engine, a draft stops one token short of the request's end, and a step without a draft
does not count.

A chain goes on only while it is the emitted text, so at every depth the token before is the one that was emitted, and all chains of all
rows are computed in one batched pass. What is left is the chance a_i that token i was accepted, given the text:

    greedy      1 where the draft's argmax is the emitted token x, else 0: the engine's own steps
    sampled     min(1, q(x) / p(x)): speculative sampling emits x by acceptance with probability min(p, q) and at all with p(x).
                The walk is then over expectations: steps and accepted tokens are weighed by how likely an anchor is one.

p needs the stored final states; without them a sampled window is walked as a greedy one, which is not calibrated. The end of a window
counts as the end of its request: where one has several windows (1024 rows, or rows lost), a step at each seam may be short.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tide_pipeline.capture.reader import WindowStates
from tide_pipeline.contracts import SamplingParams
from tide_pipeline.engine.sampling import distribution
from tide_pipeline.models.eagle3 import Eagle3Draft
from tide_pipeline.models.target import Target
from tide_pipeline.training.batches import Batch, whole
from tide_pipeline.training.loss import draft_ids
from tide_pipeline.training.target_head import TargetHead
from tide_pipeline.training.unroll import Unroll

CHUNK = 16                         # windows in one batched pass

Head = TargetHead | Target         # embeddings, lm_head and end-of-text ids


@dataclass(frozen=True)
class Replay:
    """What a draft would have done for one captured window. Add up windows of a prompt with `+`."""

    prompt_digest: str
    workload: str
    temperature: float
    steps: float                   # verification steps; expected ones where the request sampled
    accepted: tuple[float, ...]    # per position: steps that accepted the token there
    rows: int

    @property
    def acceptance_length(self) -> float:
        """Tokens per verification step, bonus token included."""
        return 1.0 + sum(self.accepted) / self.steps if self.steps else 1.0

    def __add__(self, other: Replay) -> Replay:
        accepted = tuple(a + b for a, b in zip(self.accepted, other.accepted, strict=True))
        return Replay(self.prompt_digest, self.workload, self.temperature, self.steps + other.steps, accepted, self.rows + other.rows)


@torch.no_grad()
def accept_chances(draft: Eagle3Draft, batch: Batch, windows: Sequence[WindowStates], head: Head, draft_length: int) -> Tensor:
    """[B, T, draft_length]: chance that token i of the chain drafted after row t is accepted, given that those before it were."""
    judged = [slice(_first(w), w.num_rows - 1) for w in windows]             # generated rows with a label; N of them in all windows
    unroll, ids_U = Unroll(draft, head.embedding_VD, batch.taps_BTG, batch.positions_BT, batch.segments_BT), draft_ids(draft)
    sampled = {b: _SampledText(ids_U, batch, b, rows, windows[b], head) for b, rows in enumerate(judged) if _is_judged_by_p(windows[b])}
    labels_N = torch.cat([batch.labels_BT[b, rows] for b, rows in enumerate(judged)])
    sizes = [rows.stop - rows.start for rows in judged]
    ends = list(itertools.accumulate(sizes))
    chances_BTL = torch.zeros(*batch.labels_BT.shape, draft_length, dtype=torch.float64)
    start = min(rows.start for rows in judged)
    for i in range(draft_length):
        if i == 1:
            unroll.only_from(start)
        begin = start if i else 0
        states_BTD = unroll.step(batch.next_ids_BT[:, begin:])
        states_ND = torch.cat([states_BTD[b, rows.start - begin : rows.stop - begin] for b, rows in enumerate(judged)])
        logits_NU = draft.lm_head(draft.norm(states_ND))
        found_N = (ids_U[logits_NU.argmax(-1)] == labels_N).double()
        for b, (end, size) in enumerate(zip(ends, sizes, strict=True)):
            here = slice(end - size, end)
            now = sampled[b].chances(logits_NU[here]) if b in sampled else found_N[here]
            first, last = judged[b].start, judged[b].stop
            chances_BTL[b, first : max(last - i, first), i] = now[i:].cpu()                  # row t+i of depth i belongs to anchor t
    return chances_BTL


class _SampledText:
    """The judged rows of a sampled window: p of their emitted tokens, once for all depths."""

    def __init__(self, ids_U: Tensor, batch: Batch, b: int, rows: slice, w: WindowStates, head: Head) -> None:
        assert batch.teacher_BTD is not None
        self.how = SamplingParams(temperature=w.window.temperature, top_k=w.window.top_k, top_p=w.window.top_p)
        labels_T1 = batch.labels_BT[b, rows].unsqueeze(1)
        logits_TV = batch.teacher_BTD[b, rows].float() @ head.lm_head_VD.float().T
        self.p_T = distribution(logits_TV, self.how).gather(1, labels_T1)[:, 0]
        self.at_T1 = torch.searchsorted(ids_U, labels_T1).clamp(max=len(ids_U) - 1)
        self.known_T = (ids_U[self.at_T1] == labels_T1)[:, 0]                # a draft without the token can't have proposed it

    def chances(self, logits_TU: Tensor) -> Tensor:
        """[T]: min(1, q / p)."""
        q_T = distribution(logits_TU, self.how).gather(1, self.at_T1)[:, 0] * self.known_T
        return (q_T / self.p_T).nan_to_num(1.0).clamp(max=1.0)               # p of a nucleus may be 0 after rounding to bf16


def walk(chances_TL: Sequence[Sequence[float]], first: int, last: int, has_stopped: bool) -> tuple[float, tuple[float, ...]]:
    """Expected steps from anchor `first` on, and how many of them accept position 0, 1, ...

    `last` is the row before the window's last token; `has_stopped`: that token is end-of-text, which a draft may propose as well.
    """
    draft_length = len(chances_TL[0])
    steps, by_position = 0.0, [0.0] * draft_length
    visits = [0.0] * (last + draft_length + 2)
    visits[first] = 1.0
    for anchor in range(first, last):
        alive, left = visits[anchor], last - anchor                          # tokens after the anchor's own next one
        room = min(draft_length, left if has_stopped else left - 1)
        if alive == 0.0 or room < 1:
            continue
        steps += alive
        for i in range(room):
            visits[anchor + i + 1] += alive * (1.0 - chances_TL[anchor][i])
            alive *= chances_TL[anchor][i]
            by_position[i] += alive
        visits[anchor + room + 1] += alive
    return steps, tuple(by_position)


def replay(draft: Eagle3Draft, head: Head, states: Iterable[WindowStates], draft_length: int) -> Iterator[Replay]:
    """One Replay per window that is long enough to hold a step."""
    return (one for _, one in replay_windows(draft, head, states, draft_length))


def replay_windows(draft: Eagle3Draft, head: Head, states: Iterable[WindowStates],
                   draft_length: int) -> Iterator[tuple[WindowStates, Replay]]:
    """The same, each beside its window and in the order of `states`. Windows of like length are walked together: less is padded."""
    walkable = [s for s in states if s.num_rows - 1 - _first(s) >= (1 if _has_stopped(s, head) else 2)]
    by_length = sorted(range(len(walkable)), key=lambda i: walkable[i].num_rows)
    found = dict[int, Replay]()
    for at in range(0, len(by_length), CHUNK):
        chunk = [walkable[i] for i in by_length[at : at + CHUNK]]
        chances_BTL = accept_chances(draft, whole(chunk).to(head.embedding_VD.device), chunk, head, draft_length).tolist()
        for i, s, chances_TL in zip(by_length[at : at + CHUNK], chunk, chances_BTL, strict=True):
            steps, by_position = walk(chances_TL, _first(s), s.num_rows - 1, _has_stopped(s, head))
            found[i] = Replay(s.window.prompt_digest, s.window.workload, s.window.temperature, steps, by_position, s.num_rows)
    yield from ((s, found[i]) for i, s in enumerate(walkable))


def acceptance_length(replays: Iterable[Replay]) -> float:
    """Over all steps of all windows; 1.0, no token accepted, when there is none."""
    found = list(replays)
    steps = sum(r.steps for r in found)
    return 1.0 + sum(sum(r.accepted) for r in found) / steps if steps else 1.0


def _first(s: WindowStates) -> int:
    """The first anchor: the last prompt row, or the first row of a window that begins behind it."""
    return max(s.window.num_prompt_tokens - 1 - s.window.start_pos, 0)


def _has_stopped(s: WindowStates, head: Head) -> bool:
    return int(s.token_ids[-1]) in head.shape.eos_ids


def _is_judged_by_p(s: WindowStates) -> bool:
    return s.window.temperature > 0 and s.final_TD is not None
