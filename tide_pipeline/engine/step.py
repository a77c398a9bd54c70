"""What the networks do in a step: a prompt chunk, drafting, verification. Knows running requests; no queue, no client, no sink."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tide_pipeline.contracts import StepEvent, StepKind, TapHandle
from tide_pipeline.engine.control import Plan
from tide_pipeline.engine.drafts import Proposal, Round
from tide_pipeline.engine.request import ActiveRequest
from tide_pipeline.engine.sampling import Purpose, accept_greedy, accept_sampled, distribution, draw, uniform
from tide_pipeline.engine.taps import StepRing
from tide_pipeline.models.layers import KVCache
from tide_pipeline.models.target import Target


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a step did for one request."""

    request: ActiveRequest
    drafted: list[int]             # draft tokens that were accepted or refused; what stood past the end is neither
    confidences: Sequence[float]   # of these, where the draft was asked
    accepted: int
    emitted: list[int]
    text: str
    taps: TapHandle | None

    def event(self, plan: Plan, batch: int, step_ms: float) -> StepEvent:
        """For the sink. Ask before the request moves on."""
        r = self.request
        kind = StepKind.DECODE if not self.drafted else plan.kind if r.fixed_length is None else StepKind.VERIFY
        return StepEvent(r.request.request_id, kind, r.consumed, (r.tokens[-1], *self.emitted[:-1]), tuple(self.emitted),
                         tuple(self.drafted), self.accepted, r.version, len(self.drafted), batch, step_ms, self.taps)


class StepRunner:
    """Target, its cache and the tap ring, for one engine thread. `meanwhile` is called while a GPU verifies."""

    def __init__(self, target: Target, cache: KVCache, ring: StepRing, meanwhile: Callable[[], None]) -> None:
        self.target, self.cache, self.ring, self._meanwhile = target, cache, ring, meanwhile

    def prefill(self, r: ActiveRequest, chunk: Sequence[int]) -> tuple[TapHandle | None, int | None]:
        """Consume the next chunk of a prompt; with the last one, the first output token."""
        positions_N = torch.arange(r.consumed, r.consumed + len(chunk))
        taps_NG, final_ND = self.target.forward_rows(torch.tensor(chunk), positions_N, [len(chunk)], self.cache, first_slot=r.slot)
        r.consumed += len(chunk)
        token = None
        if r.consumed == r.num_prompt:
            logits_1V, how = self.target.logits(final_ND[-1:]), r.request.sampling
            token = int(logits_1V.argmax()) if r.greedy else draw(distribution(logits_1V, how)[0],
                                                                  uniform(how.seed, r.num_prompt, Purpose.EMIT))
        if r.fixed_length != 0:
            r.waiting_taps.append(taps_NG)
        self.ring.next_slot()
        return self.ring.put(taps_NG, final_ND if self.ring.with_final else None), token

    def propose(self, running: Sequence[ActiveRequest], plan: Plan) -> Round:
        """Draft tokens by slot, of every draft that has requests here."""
        if not plan.depth:
            return Round({})
        rounds = [draft.propose(plan) for draft in {id(r.draft): r.draft for r in running if r.draft is not None}.values()]
        return Round({slot: proposal for some in rounds for slot, proposal in some.proposals.items()}, max(some.depth for some in rounds),
                     sum(some.members for some in rounds), max(some.behind for some in rounds))

    def verify(self, running: Sequence[ActiveRequest], proposals: Sequence[Proposal]) -> list[Verdict]:
        """One pass of the target over the last token and the draft tokens of every request."""
        widths = [1 + len(p.tokens) for p in proposals]
        ids_N = torch.tensor([token for r, p in zip(running, proposals, strict=True) for token in (r.tokens[-1], *p.tokens)])
        positions_N = torch.tensor([r.consumed + j for r, width in zip(running, widths, strict=True) for j in range(width)])
        taps_NG, final_ND = self.target.forward_rows(ids_N, positions_N, widths, self.cache)
        logits_NV = self.target.logits(final_ND)
        best_N = logits_NV.argmax(-1)
        self._meanwhile()
        argmax_N = best_N.tolist()                                 # here a GPU is waited for
        outcomes, at = [], 0
        for r, p, width in zip(running, proposals, widths, strict=True):
            how = r.request.sampling
            n, emitted = accept_greedy(p.tokens, argmax_N[at : at + width]) if r.greedy else accept_sampled(
                p.tokens, p.q_KV, distribution(logits_NV[at : at + width], how), how.seed, len(r.tokens))
            emitted, text = r.take(emitted, self.target.shape.eos_ids)
            kept = range(at, at + len(emitted))                    # rows of the last token and of the accepted drafts
            if r.draft is not None:
                r.waiting_taps.append(taps_NG[kept.start : kept.stop])
            outcomes.append((min(n, len(emitted)), len(emitted) > n, emitted, text, kept))
            at += width
        self.ring.next_slot()
        handles = self.ring.put_each(taps_NG, final_ND if self.ring.with_final else None, [kept for *_, kept in outcomes])
        verdicts = []
        for r, p, (accepted, whole, emitted, text, _), handle in zip(running, proposals, outcomes, handles, strict=True):
            drafted = p.tokens if whole else p.tokens[: len(emitted)]
            verdicts.append(Verdict(r, drafted, p.confidences[: len(drafted)], accepted, emitted, text, handle))
        return verdicts
