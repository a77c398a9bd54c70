"""When should a draft end? The controller's rule beside others, on the same recorded drafts and measured costs.

    python benchmarks/stop_rules.py --json benchmarks/results/stop_rules.json

Requests are served once at the longest draft length, greedily, and each step leaves how sure the draft was of its tokens and how many of
them were accepted. Policies then replay these steps, in batches of 1, 4, 8, 16, at the step costs that the engine measured when it started:

    plan         the controller without confidence: costs and acceptance of the past decide (early_stop = false)
    confidence   the controller as it is shipped
    threshold    SpecDec++: a draft ends where the product of its probabilities falls below h; the best h of six is shown, chosen afterwards
    bandit       TLT: epsilon-greedy over the lengths 0..5 by the tokens a ms that each has shown
    fixed        the best fixed length, chosen afterwards

A replay takes a step's outcome as it was recorded wherever a policy would have stood in the text: the next step begins where the longest
draft ended. Every policy meets the same texts, so the comparison is fair; the figures are tokens a ms relative to plain decoding, not
those of a served request (adaptive.py has these). No clock is read after the profile: the result has no noise but the choice of texts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench_engine import ask, drafts_of, engine_of, pick, prompts_of, serve, settings
from options import finish, parser, settle

from tide_pipeline.config import SpeculationSettings
from tide_pipeline.contracts import StepKind
from tide_pipeline.engine.control import Slot, SpeculationController
from tide_pipeline.engine.costs import StepCosts
from tide_pipeline.engine.embedded import EmbeddedEngine
from tide_pipeline.engine.step import Verdict
from tide_pipeline.engine.stopping import Lengths
from tide_pipeline.engine.survival import RequestSurvival

BATCHES = (1, 4, 8, 16)
THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6)
CONTEXT = 128                      # cached positions that all steps are costed at
WARM_UP_STEPS = 400                # request-steps that are played but not counted
EPSILON, BANDIT_KEEPS = 0.05, 0.98


@dataclass(frozen=True)
class Step:
    """One recorded verification at the longest length."""

    confidences: tuple[float, ...]
    accepted: int


class Recorder:
    """Around an engine's verification."""

    def __init__(self, engine: EmbeddedEngine) -> None:
        self.steps: dict[str, list[Step]] = {}
        self._verify = engine._runner.verify
        engine._runner.verify = self._watch  # type: ignore[method-assign]
        self._longest = engine.max_depth

    def _watch(self, running: Any, proposals: Any) -> list[Verdict]:
        verdicts = self._verify(running, proposals)
        for v in verdicts:
            if len(v.drafted) == self._longest:
                self.steps.setdefault(v.request.request.request_id, []).append(Step(tuple(v.confidences), v.accepted))
        return verdicts


@dataclass
class Seat:
    """One of the requests that run together in a replay."""

    steps: Iterator[Step]
    survival: RequestSurvival


Policy = Callable[[list[Seat], list[Step]], tuple[int, list[int]]]         # -> passes of the draft, tokens to verify by request


class Controlled:
    """The engine's own controller and stop rule."""

    def __init__(self, costs: StepCosts, how: SpeculationSettings, depth: int) -> None:
        self.control = SpeculationController(how, depth)
        self.control.costs = costs
        self.workload = self.control.survival("replay", "draft")

    def __call__(self, seats: list[Seat], steps: list[Step]) -> tuple[int, list[int]]:
        plan = self.control.plan([Slot(seat.survival, 100) for seat in seats], CONTEXT)
        if not plan.depth:
            self.control.earn(self.control.costs.verify_ms(len(seats), len(seats), CONTEXT))
            return 0, plan.lengths
        if plan.kind is StepKind.PROBE:
            batch = len(seats)
            self.control.spend(cost_ms(self.control.costs, 1, plan.depth, []) + cost_ms(self.control.costs, batch, 0, plan.lengths)
                               - cost_ms(self.control.costs, batch, 0, []))
        lengths, depth = Lengths(plan.lengths, [plan.limit(i) for i in range(len(seats))], [s.survival for s in seats], plan.worth), 1
        while lengths.go_on(depth, [step.confidences[depth - 1] for step in steps]):
            depth += 1
        return depth, lengths.final


def fixed(length: int) -> Policy:
    return lambda seats, steps: (length, [length] * len(seats))


def threshold(h: float, longest: int) -> Policy:
    def lengths(step: Step) -> int:
        product = 1.0
        for k, confidence in enumerate(step.confidences[:longest]):
            product *= confidence
            if product < h:
                return k
        return longest

    def policy(seats: list[Seat], steps: list[Step]) -> tuple[int, list[int]]:
        chosen = [lengths(step) for step in steps]
        return min(longest, max(chosen) + 1), chosen             # it must draft a token to learn that it is unsure of it

    return policy


class Bandit:
    """Epsilon-greedy over lengths, by a forgetting mean of tokens a ms."""

    def __init__(self, costs: StepCosts, depth: int) -> None:
        self._costs, self._rates, self._random = costs, [0.0] * (depth + 1), random.Random(0)

    def __call__(self, seats: list[Seat], steps: list[Step]) -> tuple[int, list[int]]:
        untried = [k for k, rate in enumerate(self._rates) if not rate]
        explores = self._random.random() < EPSILON
        k = untried[0] if untried else self._random.randrange(len(self._rates)) if explores else self._rates.index(max(self._rates))
        tokens = sum(1 + min(step.accepted, k) for step in steps)
        rate = tokens / cost_ms(self._costs, len(seats), k, [k] * len(seats))
        self._rates[k] = BANDIT_KEEPS * self._rates[k] + (1 - BANDIT_KEEPS) * rate if self._rates[k] else rate
        return k, [k] * len(seats)


def cost_ms(costs: StepCosts, batch: int, depth: int, lengths: Sequence[int]) -> float:
    return costs.draft_ms(batch, depth, CONTEXT) + costs.verify_ms(batch, batch + sum(lengths), CONTEXT)


def replay(recorded: Sequence[list[Step]], batch: int, costs: StepCosts, policy: Policy, fresh: Callable[[], RequestSurvival]) -> float:
    """Tokens a ms."""
    order = list(recorded)
    random.Random(1).shuffle(order)
    requests = iter(order)
    seats = [Seat(iter(next(requests)), fresh()) for _ in range(batch)]
    played = tokens = 0
    spent_ms = 0.0
    while True:
        steps = []
        for seat in seats:
            while (step := next(seat.steps, None)) is None:
                if (request := next(requests, None)) is None:
                    return tokens / spent_ms
                seat.steps, seat.survival = iter(request), fresh()
            steps.append(step)
        depth, lengths = policy(seats, steps)
        played += batch
        if played > WARM_UP_STEPS:
            tokens += sum(1 + min(step.accepted, k) for step, k in zip(steps, lengths, strict=True))
            spent_ms += cost_ms(costs, batch, depth, lengths)
        for seat, step, k in zip(seats, steps, lengths, strict=True):
            seat.survival.observe(k, min(step.accepted, k), step.confidences[:k])


def compare(recorded: Sequence[list[Step]], batch: int, costs: StepCosts, depth: int) -> dict[str, Any]:
    how = settings().speculation

    def unseen() -> RequestSurvival:
        return RequestSurvival(Controlled(costs, how, depth).workload)

    def speed(policy: Policy, fresh: Callable[[], RequestSurvival] = unseen) -> float:
        return round(replay(recorded, batch, costs, policy, fresh) / plain, 4)

    def controlled(is_early: bool) -> float:
        policy = Controlled(costs, replace(how, early_stop=is_early), depth)
        return speed(policy, lambda: RequestSurvival(policy.workload))

    plain = batch / costs.verify_ms(batch, batch, CONTEXT)
    by_length = {k: speed(fixed(k)) for k in range(depth + 1)}
    by_threshold = {h: speed(threshold(h, depth)) for h in THRESHOLDS}
    best, best_h = max(by_length, key=by_length.__getitem__), max(by_threshold, key=by_threshold.__getitem__)
    return {"batch": batch, "plan": controlled(False), "confidence": controlled(True), "threshold": by_threshold[best_h], "h": best_h,
            "bandit": speed(Bandit(costs, depth)), "fixed": by_length[best], "length": best}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--domains", type=lambda text: text.split(","), default=["en", "py", "de", "html"], metavar="en,py,de,html")
    options.add_argument("--prompts", type=int, default=64, help="of each domain")
    options.add_argument("--tokens", type=int, default=96, help="of each request")
    args = options.parse_args()
    result = settle()
    if args.quick:
        args.domains, args.prompts, args.tokens = ["en"], 20, 40
    batches = (2,) if args.quick else BATCHES
    with drafts_of(args.engine_dir) as drafts, engine_of(args.engine_dir, {"*": drafts.champion}, max(batches)) as engine:
        costs, depth, recorder = engine.control.costs, engine.max_depth, Recorder(engine)
        result |= {"engine": engine.digest, "step_ms": costs.table(), "relative_to": "plain decoding", "rows": []}
        costs.observe = lambda *_: None  # type: ignore[method-assign]      # as profiled: recording must not refresh the table
        for domain in args.domains:
            texts = pick(prompts_of(args.engine_dir, domain, 120), args.prompts, 0)
            recorder.steps.clear()
            serve(engine, [ask(text, args.tokens, str(depth)) for text in texts])
            recorded = list(recorder.steps.values())
            accepted = [step.accepted for steps in recorded for step in steps]
            for batch in batches:
                result["rows"].append({"domain": domain, "acceptance_length": round(1 + sum(accepted) / len(accepted), 3),
                                       **compare(recorded * 3, batch, costs, depth)})
    finish(result, args)


if __name__ == "__main__":
    main()
