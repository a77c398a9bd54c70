"""Decide what each step drafts and verifies by what pays. Knows step costs and acceptance; no network, no requests' text.

With S_i[j] the chance that request i accepts its first j draft tokens, a step that drafts d tokens for its m members and verifies the first
k_i <= d of request i is expected to yield  B + sum_i (S_i[1] + ... + S_i[k_i])  tokens in  draft_ms(m, d) + verify_ms(B, B + sum_i k_i).
The plan maximises their ratio: for each depth, draft tokens of all requests compete for rows, likeliest first, until the next one would
lower the rate. Depth 0 is one of the choices. Costs are measured (engine/costs.py), not those of equation 5 of the TIDE paper, which
promises 7-26 % too much.

While nothing is drafted nothing is observed, so a bounded share of the time goes to probes. What a plan looks at is older than any random
number of the step it plans: sampling stays exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tide_pipeline.config import SpeculationSettings
from tide_pipeline.contracts import StepKind
from tide_pipeline.engine.costs import StepCosts

PRIOR_STEPS = 6.0                # how many observations a prior is worth
REQUEST_KEEPS = 1.0 - 1.0 / 32   # of what a request showed, from step to step
LEARNING_STEPS = 2               # of every depth, in an engine that was not profiled


class Survival:
    """Acceptance of each draft position given that the one before was accepted, over all requests of a workload; forgets by a window."""

    def __init__(self, max_depth: int, window: int, prior: float) -> None:
        self._tried = [PRIOR_STEPS] * max_depth
        self._kept = [PRIOR_STEPS * prior * 0.95**i for i in range(max_depth)]
        self._keep = 1.0 - 1.0 / window

    def observe(self, drafted: int, accepted: int) -> None:
        for i in range(min(accepted + 1, drafted, len(self._tried))):      # a request may fix a length beyond the controller's
            self._tried[i] = self._tried[i] * self._keep + 1.0
            self._kept[i] = self._kept[i] * self._keep + (1.0 if i < accepted else 0.0)

    def rates(self) -> list[float]:
        return [kept / tried for kept, tried in zip(self._kept, self._tried, strict=True)]


class RequestSurvival:
    """The same for one request: what it showed lately, on top of what its workload shows. Unseen for long, it is as its workload."""

    def __init__(self, workload: Survival) -> None:
        self._workload = workload
        self._tried = [0.0] * len(workload.rates())
        self._kept = [0.0] * len(self._tried)

    def observe(self, drafted: int, accepted: int) -> None:
        """A step of the request; `drafted` is 0 when nothing was verified for it."""
        for i in range(len(self._tried)):
            seen = i < min(accepted + 1, drafted)
            self._tried[i] = self._tried[i] * REQUEST_KEEPS + seen
            self._kept[i] = self._kept[i] * REQUEST_KEEPS + (seen and i < accepted)
        if drafted:
            self._workload.observe(drafted, accepted)

    def chances(self) -> list[float]:
        """S[1..max]: that the first j tokens are all accepted."""
        out, alive = [], 1.0
        for kept, tried, rate in zip(self._kept, self._tried, self._workload.rates(), strict=True):
            alive *= (kept + PRIOR_STEPS * rate) / (tried + PRIOR_STEPS)
            out.append(alive)
        return out


@dataclass(frozen=True, slots=True)
class Slot:
    """What a plan knows of one running request."""

    survival: RequestSurvival | None   # None: it has no draft
    cap: int                           # draft tokens that it could use at most
    fixed: int | None = None           # the length that its client asked for


@dataclass(frozen=True, slots=True)
class Plan:
    """Draft tokens to verify by request, in the order of the slots. Drafting runs as deep as the longest."""

    lengths: list[int]
    kind: StepKind = StepKind.VERIFY   # of the requests that the controller decides for

    @property
    def depth(self) -> int:
        return max(self.lengths, default=0)


class SpeculationController:
    """One per engine. Acceptance is kept per workload, draft version, and greedy or sampled: a new draft starts from the prior, a request
    from its workload."""

    def __init__(self, settings: SpeculationSettings, max_depth: int) -> None:
        self.settings, self.max_depth = settings, min(max_depth, settings.max_draft_length)
        self.costs = StepCosts()
        self._workloads: dict[tuple[str, str, bool], Survival] = {}
        self._learned = 0
        self._probe_credit_ms = 0.0
        self.probe_ms = 0.0

    def survival(self, workload: str, draft_version: str, is_sampled: bool = False) -> Survival:
        """Of all requests of a workload that this draft served; sampled text is harder to draft than greedy text."""
        key = (workload, draft_version, is_sampled)
        if key not in self._workloads:
            self._workloads[key] = Survival(self.max_depth, self.settings.survival_window, self.settings.prior_acceptance)
        return self._workloads[key]

    def forget(self, draft_versions: set[str]) -> None:
        """Keep estimates of these drafts only."""
        self._workloads = {key: value for key, value in self._workloads.items() if key[1] in draft_versions}

    def plan(self, slots: Sequence[Slot], catch_up_ms: float = 0.0) -> Plan:
        """What pays most now; a probe where nothing does and one is due. `catch_up_ms`: what a probe costs before it can draft."""
        auto = [i for i, slot in enumerate(slots) if slot.fixed is None and slot.survival is not None and slot.cap > 0]
        lengths = [min(slot.fixed, slot.cap) if slot.fixed is not None and slot.survival is not None else 0 for slot in slots]
        if not auto:
            return Plan(lengths)
        if not self.costs.is_profiled:
            return self._learn(slots, auto, lengths)
        best = self._best(slots, auto, lengths)
        if not any(best[i] for i in auto) and self._probe_due(slots, auto, catch_up_ms):
            return Plan(_with_auto(slots, auto, lengths, self._probe_length), StepKind.PROBE)
        return Plan(best)

    def earn(self, step_ms: float) -> None:
        """A plain step earns its share of time for probes."""
        self._probe_credit_ms += step_ms * self.settings.probe_share

    def _best(self, slots: Sequence[Slot], auto: Sequence[int], lengths: list[int]) -> list[int]:
        batch, members, floor = len(slots), _members(slots), max(lengths)
        candidates = sorted(((-chance, j, i) for i in auto for j, chance in enumerate(_chances(slots[i]), start=1)))
        rows, tokens = batch + sum(lengths), float(batch) + sum(sum(_chances(slots[i])[:n]) for i, n in enumerate(lengths) if n)
        best_rate = tokens / (self.costs.draft_ms(members, floor) + self.costs.verify_ms(batch, rows))
        best_rate, best = best_rate * (1.0 + self.settings.switch_margin), lengths
        for depth in range(1, self.max_depth + 1):
            draft_ms = self.costs.draft_ms(members, max(depth, floor))
            now, expected, taken, rate = rows, tokens, [], 0.0
            for chance, j, i in candidates:
                if j > depth:
                    continue
                now, expected = now + 1, expected - chance
                next_rate = expected / (draft_ms + self.costs.verify_ms(batch, now))
                if next_rate < rate:
                    break
                rate = next_rate
                taken.append(i)
            if rate > best_rate:
                best_rate, best = rate, list(lengths)
                for i in taken:
                    best[i] += 1
        return best

    def _learn(self, slots: Sequence[Slot], auto: Sequence[int], lengths: list[int]) -> Plan:
        """An engine that got its first draft while serving was never profiled: every depth is tried in turn."""
        depth = self._learned % (self.max_depth + 1)
        self._learned += 1
        self.costs.is_profiled = self._learned >= LEARNING_STEPS * (self.max_depth + 1)
        return Plan(_with_auto(slots, auto, lengths, depth))

    @property
    def _probe_length(self) -> int:
        return min(self.settings.probe_length, self.max_depth)

    def _probe_due(self, slots: Sequence[Slot], auto: Sequence[int], catch_up_ms: float) -> bool:
        """Whether the earned time pays for a probe now, catch-up of the draft's cache included."""
        batch, length = len(slots), self._probe_length
        more = self.costs.verify_ms(batch, batch + length * len(auto)) - self.costs.verify_ms(batch, batch)
        cost = max(more, 0.0) + self.costs.draft_ms(_members(slots), length) + catch_up_ms
        if self._probe_credit_ms < cost:
            return False
        self._probe_credit_ms -= cost
        self.probe_ms += cost
        return True


def _members(slots: Sequence[Slot]) -> int:
    """Requests that are drafted for when any is."""
    return sum(slot.survival is not None for slot in slots)


def _with_auto(slots: Sequence[Slot], auto: Sequence[int], lengths: Sequence[int], depth: int) -> list[int]:
    """`lengths`, with `depth` for the requests that the controller decides for."""
    out = list(lengths)
    for i in auto:
        out[i] = min(depth, slots[i].cap)
    return out


def _chances(slot: Slot) -> list[float]:
    return slot.survival.chances()[: slot.cap] if slot.survival is not None else []
