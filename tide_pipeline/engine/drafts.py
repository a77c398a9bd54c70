"""Drafts resident in the engine, each with its own cache and members. Proposes tokens; verifies nothing.

A request belongs to one draft from admission to its end, so no request ever mixes two drafts' KV: after a swap the
old draft stays until its last member ends. Members hold the lowest slots of their draft's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tide_pipeline.contracts import EngineBuild
from tide_pipeline.engine.sampling import Purpose, distribution, draw, uniform
from tide_pipeline.errors import BuildError
from tide_pipeline.models.checkpoint import DraftIdentity, digest_draft, load_draft
from tide_pipeline.models.eagle3 import DraftRunner
from tide_pipeline.models.target import Target

if TYPE_CHECKING:
    from tide_pipeline.engine.request import ActiveRequest

WIDE_CATCH_UP = 8                 # waiting rows above this are fed for one request alone, not padded into the batch


@dataclass(frozen=True)
class Proposal:
    """Draft tokens of one request and, when it samples, the distributions they were drawn from [K, V]."""

    tokens: list[int]
    q_KV: Tensor | None = None


class ResidentDraft:
    """One loaded draft. Raises what `load_draft` raises, before anything runs on it."""

    def __init__(self, build: EngineBuild, target: Target, slots: int, positions: int) -> None:
        folder = Path(build.path) / "draft"
        identity = DraftIdentity(target.spec.name, target.digest, target.spec.capture_layers)
        self.build = build
        self.digest = digest_draft(folder)
        if build.draft_digest and build.draft_digest != self.digest:
            raise BuildError(f"draft {folder} has digest {self.digest[:16]}, build {build.build_id} names {build.draft_digest[:16]}: "
                             "it was altered, build it again with `tide build`")
        self.runner = DraftRunner(load_draft(folder, target.shape, identity), target.embedding_VD)
        self.cache = self.runner.new_cache(slots, positions + WIDE_CATCH_UP)    # padding may reach past the last position
        self.members: list[ActiveRequest] = []

    def join(self, request: ActiveRequest) -> None:
        request.draft, request.draft_slot = self, len(self.members)
        self.members.append(request)

    def leave(self, request: ActiveRequest) -> None:
        """The last member moves into the hole."""
        last = self.members.pop()
        if last is not request:
            self.cache.move(last.draft_slot, request.draft_slot, last.draft_rows)
            last.draft_slot = request.draft_slot
            self.members[last.draft_slot] = last

    def propose(self, lengths: Sequence[int]) -> list[Proposal]:
        """Bring the cache up to date, then draft up to max(lengths) tokens for the members; cut to each one's length."""
        members, depth = self.members, max(lengths)
        for member in members:
            if member.waiting_rows > WIDE_CATCH_UP:
                self._feed(member)
        self._feed_together(members)
        state_BD = torch.stack([m.draft_state for m in members if m.draft_state is not None])
        drawn: list[list[int]] = [[] for _ in members]
        kept: list[list[Tensor]] = [[] for _ in members]
        rows_B = torch.tensor([m.draft_rows for m in members])
        for j in range(depth):
            ids = self._pick(members, self.runner.logits(state_BD), j, kept)
            for tokens, token in zip(drawn, ids, strict=True):
                tokens.append(token)
            if j + 1 < depth:
                state_BD = self.runner.step(state_BD, torch.tensor(ids), rows_B + j, self.cache)
        return [Proposal(tokens[:k], torch.stack(q[:k]) if q and k else None)
                for tokens, q, k in zip(drawn, kept, lengths, strict=True)]

    def catch_up(self, members: Sequence[ActiveRequest]) -> None:
        """Feed what waits for these members, one by one, without drafting."""
        for member in members:
            self._feed(member)

    def _feed_together(self, members: Sequence[ActiveRequest]) -> None:
        """Draft row t is (taps of t, token t + 1), at position t; members with fewer waiting rows are padded."""
        if len(members) == 1 and members[0].waiting_rows:
            self._feed(members[0])
        if not any(m.waiting_rows for m in members):
            return
        W = max(m.waiting_rows for m in members)
        taps = self.runner.empty_taps(len(members), W)
        ids = torch.zeros(len(members), W, dtype=torch.long)
        starts = torch.tensor([m.draft_rows for m in members])
        for i, m in enumerate(members):
            if n := m.waiting_rows:
                taps[i, :n] = m.take_waiting()
                ids[i, :n] = torch.tensor(m.tokens[m.draft_rows + 1 : m.consumed + 1])
        states = self.runner.extend(taps, ids, starts.unsqueeze(1) + torch.arange(W), self.cache)
        for i, m in enumerate(members):
            if n := m.waiting_rows:
                m.draft_state, m.draft_rows = states[i, n - 1], m.consumed

    def _feed(self, m: ActiveRequest) -> None:
        n = m.waiting_rows
        ids = torch.tensor([m.tokens[m.draft_rows + 1 : m.consumed + 1]])
        positions = torch.arange(m.draft_rows, m.consumed).unsqueeze(0)
        states = self.runner.extend(m.take_waiting().unsqueeze(0), ids, positions, self.cache, first_slot=m.draft_slot)
        m.draft_state, m.draft_rows = states[0, n - 1], m.consumed

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
