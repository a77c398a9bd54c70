"""Offline acceptance: the draft replayed over captured windows, compared with what was really emitted. Knows no files.

The engine's greedy walk is simulated. Anchor row r has the true taps g_r and the token x_{r+1} after it; the draft chains
d_0, d_1, ... for x_{r+2}, x_{r+3}, ... With n of them right the step emits n + 1 tokens and the next anchor is r + n + 1.
The first anchor is the last prompt row, num_prompt_tokens - 1 (its next token is the first one generated), so the first
token judged is the second generated one; the walk stops where `draft_length` further tokens were not captured.

Chains of all rows are computed in one batched pass; only then is the walk made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from tide_pipeline.capture.reader import WindowStates
from tide_pipeline.models.eagle3 import Eagle3Draft
from tide_pipeline.training.batches import Batch, whole
from tide_pipeline.training.loss import draft_ids
from tide_pipeline.training.unroll import Unroll

CHUNK = 16                         # windows in one batched pass


@dataclass(frozen=True)
class Replay:
    """What a draft would have done for one captured window. Add up windows of a prompt with `+`."""

    prompt_digest: str
    workload: str
    temperature: float
    steps: int                     # simulated verification steps
    accepted: tuple[int, ...]      # per position: steps that accepted the token there
    rows: int

    @property
    def acceptance_length(self) -> float:
        """Tokens per verification step, bonus token included."""
        return 1.0 + sum(self.accepted) / max(self.steps, 1)

    def __add__(self, other: Replay) -> Replay:
        accepted = tuple(a + b for a, b in zip(self.accepted, other.accepted, strict=True))
        return Replay(self.prompt_digest, self.workload, self.temperature, self.steps + other.steps, accepted, self.rows + other.rows)


@torch.no_grad()
def greedy_hits(draft: Eagle3Draft, batch: Batch, embedding_VD: Tensor, draft_length: int) -> Tensor:
    """[B, T, draft_length]: was token i of the chain drafted after row t the one that was emitted?"""
    unroll = Unroll(draft, embedding_VD, batch.taps_BTG, batch.positions_BT, batch.segments_BT)
    ids_U, next_ids_BT = draft_ids(draft), batch.next_ids_BT
    hits = []
    for i in range(draft_length):
        logits_BTU = draft.lm_head(draft.norm(unroll.step(next_ids_BT)))
        drafted_BT = ids_U[logits_BTU.argmax(-1)]
        hits.append((drafted_BT == batch.labels_BT).roll(-i, dims=1))        # row t+i of depth i belongs to anchor t
        next_ids_BT = drafted_BT.roll(1, dims=1)
    return torch.stack(hits, dim=-1)


def walk(accepted_T: Sequence[int], first: int, last: int, draft_length: int) -> tuple[int, tuple[int, ...]]:
    """Steps made from anchor `first` while anchor <= `last`, and how many of them accepted position 0, 1, ..."""
    steps, by_position, anchor = 0, [0] * draft_length, first
    while anchor <= last:
        n = accepted_T[anchor]
        steps += 1
        for i in range(n):
            by_position[i] += 1
        anchor += n + 1
    return steps, tuple(by_position)


def replay(draft: Eagle3Draft, embedding_VD: Tensor, states: Iterable[WindowStates], draft_length: int) -> Iterator[Replay]:
    """One Replay per window that is long enough to hold a step."""
    device = embedding_VD.device
    walkable = (s for s in states if _anchors(s, draft_length))
    while chunk := list(islice(walkable, CHUNK)):
        hits_BTL = greedy_hits(draft, whole(chunk).to(device), embedding_VD, draft_length)
        accepted_BT = hits_BTL.long().cumprod(-1).sum(-1).tolist()
        for s, accepted_T in zip(chunk, accepted_BT, strict=True):
            anchors = _anchors(s, draft_length)
            steps, by_position = walk(accepted_T, anchors.start, anchors.stop - 1, draft_length)
            yield Replay(s.window.prompt_digest, s.window.workload, s.window.temperature, steps, by_position, len(s.taps_TG))


def acceptance_length(replays: Iterable[Replay]) -> float:
    """Over all steps of all windows; 1.0, no token accepted, when there is none."""
    found = list(replays)
    return 1.0 + sum(sum(r.accepted) for r in found) / max(sum(r.steps for r in found), 1)


def _anchors(s: WindowStates, draft_length: int) -> range:
    """Rows that may be an anchor: generated, and with `draft_length` captured tokens to compare."""
    first = max(s.window.num_prompt_tokens - 1 - s.window.start_pos, 0)
    return range(first, len(s.token_ids) - draft_length - 1)                # row r is compared with tokens r+2 .. r+1+draft_length
