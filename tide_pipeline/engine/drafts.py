"""Drafts resident in the engine, each with its own cache and members. Proposes tokens; verifies nothing.

A request belongs to one draft from admission to its end, so no request ever mixes two drafts' KV: after a swap the
old draft stays until its last member ends. Members hold the lowest slots of their draft's cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tide_pipeline.contracts import EngineBuild
from tide_pipeline.engine.control import Plan
from tide_pipeline.engine.sampling import Purpose, distribution, draw, uniform
from tide_pipeline.engine.stopping import Lengths
from tide_pipeline.models.checkpoint import DraftIdentity, checked_digest, load_draft
from tide_pipeline.models.eagle3 import DraftRunner
from tide_pipeline.models.target import Target

if TYPE_CHECKING:
    from tide_pipeline.engine.request import ActiveRequest

MOST_PADDING = 3                  # rows of attention's rectangle for each row that waits; beyond, the widest member is fed alone


@dataclass(frozen=True)
class Proposal:
    """Draft tokens of one request and, when it samples, the distributions they were drawn from [K, V]; else how sure the draft was."""

    tokens: list[int]
    q_KV: Tensor | None = None
    confidences: Sequence[float] = ()


NOTHING = Proposal([])


@dataclass(frozen=True)
class Round:
    """What drafting did in a step."""

    proposals: dict[int, Proposal]        # by slot of the target's cache; NOTHING for the others
    depth: int = 0                        # passes of the draft
    members: int = 0                      # requests in each
    behind: int = 0                       # most rows that one of them had waiting


class ResidentDraft:
    """One loaded draft. Raises what `load_draft` raises, before anything runs on it."""

    def __init__(self, build: EngineBuild, target: Target, slots: int, positions: int) -> None:
        folder = Path(build.path) / "draft"
        identity = DraftIdentity(target.spec.name, target.digest, target.spec.capture_layers)
        self.build = build
        self.digest = checked_digest(folder, build)
        self.runner = DraftRunner(load_draft(folder, target.shape, identity), target.embedding_VD)
        self.cache = self.runner.new_cache(slots, positions)
        self.members: list[ActiveRequest] = []

    def join(self, request: ActiveRequest) -> None:
        request.draft, request.version, request.draft_slot = self, self.build.draft_version, len(self.members)
        self.members.append(request)

    def leave(self, request: ActiveRequest) -> None:
        """The last member moves into the hole."""
        last = self.members.pop()
        if last is not request:
            self.cache.move(last.draft_slot, request.draft_slot, last.draft_rows)
            last.draft_slot = request.draft_slot
            self.members[last.draft_slot] = last

    def propose(self, plan: Plan) -> Round:
        """Draft for the members from the first to the last that the plan drafts for, after bringing their cache up to date."""
        wanted = [m.draft_slot for m in self.members if plan.lengths[m.slot]]
        if not wanted:
            return Round({})
        first, members = wanted[0], self.members[wanted[0] : wanted[-1] + 1]
        behind, asked = max(m.waiting_rows for m in members), any(m.greedy for m in members)
        self.catch_up(members)
        lengths = Lengths([plan.lengths[m.slot] for m in members], [plan.limit(m.slot) for m in members],
                          [m.survival for m in members], plan.worth)
        state_BD = torch.stack([m.draft_state for m in members if m.draft_state is not None])
        rows_B = torch.tensor([m.draft_rows for m in members])
        drawn: list[list[int]] = []                                # [depth][member]
        sure: list[list[float]] = []                               # the same; nobody asks how sure a sampled draft is
        kept: list[list[Tensor]] = [[] for _ in members]
        while True:
            logits_BV = self.runner.logits(state_BD)
            sure.append(confidences(logits_BV) if asked else [])
            drawn.append(self._pick(members, logits_BV, len(drawn), kept))
            if not lengths.go_on(len(drawn), sure[-1]):
                break
            state_BD = self.runner.step(state_BD, torch.tensor(drawn[-1]), rows_B + len(drawn) - 1, self.cache, first)
        proposals = {m.slot: Proposal([ids[i] for ids in drawn[:k]], torch.stack(kept[i][:k]) if kept[i] and k else None,
                                      [c[i] for c in sure[:k]] if m.greedy else ())
                     for i, (m, k) in enumerate(zip(members, lengths.final, strict=True))}
        return Round(proposals, len(drawn), len(members), behind)

    def catch_up(self, members: Sequence[ActiveRequest]) -> None:
        """Feed what waits for these members, neighbours in the cache, in one pass; one who has far more than the others goes alone."""
        widths = [m.waiting_rows for m in members]
        while len(members) > 1 and max(widths) * len(widths) > MOST_PADDING * sum(widths):
            widest = widths.index(max(widths))
            self._feed(members[widest : widest + 1])
            widths[widest] = 0
        if any(widths):
            self._feed(members)

    def _feed(self, members: Sequence[ActiveRequest]) -> None:
        """Draft row t is (taps of t, token t + 1), at position t."""
        widths = [m.waiting_rows for m in members]
        ids_N = torch.tensor([token for m in members for token in m.tokens[m.draft_rows + 1 : m.consumed + 1]])
        positions_N = torch.tensor([row for m in members for row in range(m.draft_rows, m.consumed)])
        taps_NG = torch.cat([rows for m in members for rows in m.take_waiting()])
        states_ND = self.runner.extend(taps_NG, ids_N, positions_N, widths, self.cache, members[0].draft_slot)
        for m, end, width in zip(members, itertools.accumulate(widths), widths, strict=True):
            if width:
                m.draft_state, m.draft_rows = states_ND[end - 1], m.consumed

    def _pick(self, members: Sequence[ActiveRequest], logits_BV: Tensor, j: int, kept: list[list[Tensor]]) -> list[int]:
        """Greedy requests take the argmax; sampling ones draw, and keep the distribution in the target's vocabulary."""
        ids: list[int] = self.runner.to_target(logits_BV.argmax(-1)).tolist()
        for i, m in enumerate(members):
            if not m.greedy:
                how = m.request.sampling
                q = distribution(logits_BV[i : i + 1], how)[0]
                if not self.runner.full_vocab:
                    wide = q.new_zeros(self.runner.shape.vocab_size)
                    q = wide.index_add_(0, self.runner.to_target(torch.arange(len(q), device=q.device)), q)  # d2t may name a token twice
                kept[i].append(q)
                ids[i] = draw(q, uniform(how.seed, len(m.tokens) + j, Purpose.DRAFT))
        return ids


def confidences(logits_BV: Tensor) -> list[float]:
    """The highest probability of each row [B]."""
    sure: list[float] = (logits_BV.amax(-1).float() - logits_BV.float().logsumexp(-1)).exp().tolist()
    return sure
