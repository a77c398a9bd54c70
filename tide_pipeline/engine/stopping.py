"""Stop drafting where the draft doubts itself. Knows probabilities and what a row and a pass are worth; no network, no clock.

A plan is made before the draft has seen the step; each draft pass then tells how sure the draft is of its next token. A token is verified
while the chance that all up to it are accepted is above what its row costs, in tokens that the same time would yield elsewhere; another
pass is run while what it may add is above what it costs (SpecDec++'s rule, with both thresholds measured).

Greedy requests only: how long a sampled draft gets is settled before its tokens are drawn, so sampling stays exact, and the highest
probability says little about the overlap of two distributions. The first token is always verified: acceptance of the first position
is what drift is judged by, and must not depend on how sure the draft was. Source: docs/engine.md, with what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tide_pipeline.engine.survival import RequestSurvival


@dataclass(frozen=True, slots=True)
class Worth:
    """Tokens that the time of a step would yield elsewhere, at the rate of its plan."""

    row: float                       # of verifying one more token
    passes: tuple[float, ...]        # [j]: of pass j + 1 of the draft, after pass j; the first is free


NO_WORTH = Worth(0.0, ())


class Lengths:
    """The draft lengths of one draft's members in one step, as they come to be known.

    planned    tokens that a member gets where its confidence is not asked
    limits     tokens that a member may get where it is; 0 where not
    members    what is known of each member's acceptance
    """

    def __init__(self, planned: Sequence[int], limits: Sequence[int], members: Sequence[RequestSurvival | None], worth: Worth) -> None:
        self.final = [1 if limit else length for length, limit in zip(planned, limits, strict=True)]
        self._limits, self._worth, self._planned_depth = limits, worth, max(self.final, default=0)
        self._alive = {i: (1.0, member.workload) for i, member in enumerate(members) if member is not None and limits[i]}

    def go_on(self, depth: int, confidences: Sequence[float]) -> bool:
        """Whether to draft another token, `depth` of them having been drafted; `confidences` are those of the newest, by member."""
        hoped = 0.0
        for i, (chance, workload) in list(self._alive.items()):
            chance *= workload.confidence.chance(confidences[i])
            if chance < self._worth.row:
                del self._alive[i]
                continue
            self.final[i] = depth
            if depth == self._limits[i]:
                del self._alive[i]
                continue
            self._alive[i] = chance, workload
            hoped += max(0.0, chance * workload.rates()[depth] - self._worth.row)
        return depth < self._planned_depth or (bool(self._alive) and hoped > self._worth.passes[depth])
