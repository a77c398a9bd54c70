"""Decide what each step drafts and verifies by what pays. Knows step costs and acceptance; no network, no requests' text.

With S_i[j] the chance that request i accepts its first j draft tokens, a step that drafts d tokens for its m members and verifies the first
k_i <= d of request i is expected to yield  B + sum_i (S_i[1] + ... + S_i[k_i])  tokens in  draft_ms(m, d) + verify_ms(B, B + sum_i k_i).
The plan maximises their ratio: for each depth, draft tokens of all requests compete for rows, likeliest first, until the next one would
lower the rate. Depth 0 is one of the choices. Costs are measured (engine/costs.py), not those of equation 5 of the TIDE paper, which
promises 7-26 % too much. While the step drafts, its greedy requests end or go on by the draft's confidence (engine/stopping.py).

While nothing is drafted nothing is observed, so a bounded share of the time goes to probes, of one request each. What a plan looks at is
older than any random number of the step it plans: sampling stays exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tide_pipeline.config import SpeculationSettings
from tide_pipeline.contracts import StepKind
from tide_pipeline.engine.costs import StepCosts
from tide_pipeline.engine.stopping import NO_WORTH, Worth
from tide_pipeline.engine.survival import RequestSurvival, Survival

LEARNING_STEPS = 2               # of every depth, in an engine that was not profiled
REST_STEPS = 8                   # that a plan to draft nothing stands, while nobody joins or leaves


@dataclass(frozen=True, slots=True)
class Slot:
    """What a plan knows of one running request."""

    survival: RequestSurvival | None   # None: it has no draft
    cap: int                           # draft tokens that it could use at most
    fixed: int | None = None           # the length that its client asked for
    waiting: int = 0                   # rows that its draft has not seen
    is_greedy: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """Draft tokens to verify by request, in the order of the slots. Drafting runs as deep as the longest."""

    lengths: list[int]
    kind: StepKind = StepKind.VERIFY       # of the requests that the controller decides for
    limits: Sequence[int] = ()             # where confidence decides: the most tokens of each request, 0 for the others
    worth: Worth = NO_WORTH

    @property
    def depth(self) -> int:
        return max(self.lengths, default=0)

    def limit(self, slot: int) -> int:
        return self.limits[slot] if self.limits else 0


class SpeculationController:
    """One per engine. Acceptance is kept per workload, draft version, and greedy or sampled: a new draft starts from the prior, a request
    from its workload."""

    def __init__(self, settings: SpeculationSettings, max_depth: int) -> None:
        self.settings, self.max_depth = settings, min(max_depth, settings.max_draft_length)
        self.costs = StepCosts()
        self.spent_ms = 0.0                    # on probes and on catching up without drafting
        self._workloads: dict[tuple[str, str, bool], Survival] = {}
        self._probed: dict[Survival, int] = {}                     # number of the last probe of a workload
        self._probes = self._learned = self._rest = 0
        self._credit_ms = 0.0

    def survival(self, workload: str, draft_version: str, is_sampled: bool = False) -> Survival:
        """Of all requests of a workload that this draft served; sampled text is harder to draft than greedy text."""
        key = (workload, draft_version, is_sampled)
        if key not in self._workloads:
            self._workloads[key] = Survival(self.max_depth, self.settings.survival_window, self.settings.prior_acceptance)
        return self._workloads[key]

    def forget(self, draft_versions: set[str]) -> None:
        """Keep estimates of these drafts only."""
        self._workloads = {key: value for key, value in self._workloads.items() if key[1] in draft_versions}
        self._probed = {survival: n for survival, n in self._probed.items() if survival in self._workloads.values()}

    def changed(self) -> None:
        """A request joined or left: the next step is planned anew."""
        self._rest = 0

    def rests(self) -> bool:
        """Whether the last plan, to draft nothing, still stands."""
        self._rest -= 1
        return self._rest >= 0

    def plan(self, slots: Sequence[Slot], context: int = 0) -> Plan:
        """What pays most now; a probe where nothing does and one is due. `context`: positions of the longest request."""
        auto = [i for i, slot in enumerate(slots) if slot.fixed is None and slot.survival is not None and slot.cap > 0]
        lengths = [min(slot.fixed, slot.cap) if slot.fixed is not None and slot.survival is not None else 0 for slot in slots]
        if not auto:
            return Plan(lengths)
        if not self.costs.is_profiled:
            return self._learn(slots, auto, lengths)
        best, rate = self._best(slots, auto, lengths, context)
        if any(best[i] for i in auto):
            return self._with_confidence(slots, auto, best, rate, context)
        if not any(best):
            if (i := self._probe(slots, auto, context)) is not None:
                return Plan([self._probe_length(slots[i]) if j == i else 0 for j in range(len(slots))], StepKind.PROBE)
            self._rest = REST_STEPS
        return Plan(best)

    def earn(self, step_ms: float) -> None:
        """A plain step earns its share of time for probes and for catching up."""
        self._credit_ms += step_ms * self.settings.probe_share

    def spend(self, ms: float) -> None:
        """What a probe cost beyond a plain step, or catching up did: measured, so that the share is kept whatever was expected."""
        self._credit_ms -= ms
        self.spent_ms += ms

    def can_pay(self, ms: float) -> bool:
        return self._credit_ms >= ms

    def catch_up_ms(self, rows: int) -> float:
        """Estimate for rows that a draft has not seen: each costs it about a hundredth of a plain step."""
        return rows * self.costs.verify_ms(1, 1) / 100.0

    def _best(self, slots: Sequence[Slot], auto: Sequence[int], lengths: list[int], context: int) -> tuple[list[int], float]:
        """Lengths, and the tokens a ms that they are expected to yield."""
        batch, members, floor, costs = len(slots), _members(slots), max(lengths), self.costs
        candidates = sorted(((-chance, j, i) for i in auto for j, chance in enumerate(_chances(slots[i]), start=1)))
        rows, tokens = batch + sum(lengths), float(batch) + sum(sum(_chances(slots[i])[:n]) for i, n in enumerate(lengths) if n)
        best_rate = tokens / (costs.draft_ms(members, floor, context) + costs.verify_ms(batch, rows, context))
        best_rate, best = best_rate * (1.0 + self.settings.switch_margin), lengths
        for depth in range(1, self.max_depth + 1):
            draft_ms = costs.draft_ms(members, max(depth, floor), context)
            now, expected, taken, rate = rows, tokens, [], 0.0
            for chance, j, i in candidates:
                if j > depth:
                    continue
                now, expected = now + 1, expected - chance
                next_rate = expected / (draft_ms + costs.verify_ms(batch, now, context))
                if next_rate < rate:
                    break
                rate = next_rate
                taken.append(i)
            if rate > best_rate:
                best_rate, best = rate, list(lengths)
                for i in taken:
                    best[i] += 1
        return best, best_rate

    def _with_confidence(self, slots: Sequence[Slot], auto: Sequence[int], lengths: list[int], rate: float, context: int) -> Plan:
        """Greedy requests that the plan drafts for may stop before their planned length, or go on beyond it."""
        limits = [0] * len(slots)
        for i in auto:
            if self.settings.early_stop and slots[i].is_greedy and lengths[i]:
                limits[i] = min(slots[i].cap, self.max_depth)
        if not any(limits):
            return Plan(lengths)
        batch, members, costs = len(slots), _members(slots), self.costs
        most = batch * self.max_depth
        row_ms = (costs.verify_ms(batch, batch + most, context) - costs.verify_ms(batch, batch, context)) / most
        pass_ms = [costs.draft_ms(members, j + 1, context) - costs.draft_ms(members, j, context) for j in range(self.max_depth)]
        return Plan(lengths, limits=limits, worth=Worth(rate * row_ms, tuple(rate * ms for ms in pass_ms)))

    def _learn(self, slots: Sequence[Slot], auto: Sequence[int], lengths: list[int]) -> Plan:
        """An engine that got its first draft while serving was never profiled: every depth is tried in turn."""
        depth = self._learned % (self.max_depth + 1)
        self._learned += 1
        self.costs.is_profiled = self._learned >= LEARNING_STEPS * (self.max_depth + 1)
        for i in auto:
            lengths[i] = min(depth, slots[i].cap)
        return Plan(lengths)

    def _probe_length(self, slot: Slot) -> int:
        return min(self.settings.probe_length, self.max_depth, slot.cap)

    def _probe(self, slots: Sequence[Slot], auto: Sequence[int], context: int) -> int | None:
        """The request to probe, if the earned time pays: of the workload whose last probe is longest ago, the cheapest to catch up."""
        def order(i: int) -> tuple[int, int]:
            return self._probed.get(_workload(slots[i]), 0), slots[i].waiting

        i, batch = min(auto, key=order), len(slots)
        length = self._probe_length(slots[i])
        more_ms = self.costs.verify_ms(batch, batch + length, context) - self.costs.verify_ms(batch, batch, context)
        if not self.can_pay(max(more_ms, 0.0) + self.costs.draft_ms(1, length, context) + self.catch_up_ms(slots[i].waiting)):
            return None
        self._probes += 1
        self._probed[_workload(slots[i])] = self._probes
        return i


def _members(slots: Sequence[Slot]) -> int:
    """Requests that are drafted for when any is."""
    return sum(slot.survival is not None for slot in slots)


def _workload(slot: Slot) -> Survival:
    assert slot.survival is not None, "the controller decides for requests with a draft only"
    return slot.survival.workload


def _chances(slot: Slot) -> list[float]:
    return slot.survival.chances()[: slot.cap] if slot.survival is not None else []
