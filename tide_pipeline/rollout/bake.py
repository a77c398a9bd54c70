"""May the new draft stay? Numbers in, decision out. Pure: knows no record, no clock and no lake.

First-position acceptance decides: the new draft is fine when it is certainly not worse than allowed, and worse when it certainly is.
Time per token and errors can only send it back, unless the gate left the benchmark to the canary (TensorRT-LLM): then time per token
decides as acceptance does, and a draft that was not timed when time is up does not stay. "Certainly" is meant at every look at once
(sequential.py), so that a draft that is no worse is rolled back in at most `FALSE_ROLLBACKS` of all rollouts, however often somebody looks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from tide_pipeline.config import RolloutSettings
from tide_pipeline.rollout.live import Rate
from tide_pipeline.rollout.sequential import Gap

MIN_SPEED_BLOCKS = 10              # stretches of time in which both sides answered
MIN_FINISHED = 20                  # requests on each side, before errors are compared


class Decision(StrEnum):
    FINE = "fine"                  # certainly not worse than allowed, or nothing speaks against it when time is up
    WORSE = "worse"                # certainly worse than allowed
    OPEN = "open"                  # more traffic would tell
    UNTIMED = "untimed"            # time is up, and what only this bake could measure was not measured


@dataclass(frozen=True)
class BakeVerdict:
    """What is known so far, in one sentence with the numbers."""

    decision: Decision
    reason: str


@dataclass(frozen=True, slots=True)
class Evidence:
    """What live traffic says of a rollout."""

    new: Rate                              # first-position acceptance with the new draft
    old: Rate | None = None                # with the draft it replaces; None where there is nothing to compare with
    against: str = ""                      # where `old` is from, as in "before 0.61 on 2 control replicas"
    slower: Gap | None = None              # log of the time per token, new over old; None where there is nothing to compare with
    errors: Gap | None = None              # share of requests that ended with an error
    has_traffic: bool = False              # whether the replicas with the new draft answered anything
    error: str = ""                        # why the log could not be read: nothing goes forward then
    slower_than: str = ""                  # where the old time per token is from, as in "beside it"


def judge_bake(evidence: Evidence, settings: RolloutSettings, *, time_is_up: bool = False, must_time: bool = False) -> BakeVerdict:
    """When time is up, what is still open stays, unless it fell by more than allowed and certainly fell at all.

    `must_time`: the gate left the benchmark to this bake.
    """
    for gap, allowed, least, what in ((evidence.slower, math.log1p(settings.max_slowdown), MIN_SPEED_BLOCKS, "time per token, log ratio"),
                                      (evidence.errors, settings.max_error_rise, MIN_FINISHED, "share of errors, rise")):
        if gap is not None and gap.n >= least and gap.interval(scale_of(allowed))[0] > allowed:
            return BakeVerdict(Decision.WORSE, _tell(what, gap, allowed))
    accepted = _judge_acceptance(evidence, settings, time_is_up)
    return accepted if not must_time or accepted.decision is Decision.WORSE else _judge_time(accepted, evidence, settings, time_is_up)


def _judge_time(accepted: BakeVerdict, evidence: Evidence, settings: RolloutSettings, time_is_up: bool) -> BakeVerdict:
    """Acceptance does not speak against it: was it timed, and is it fast enough?"""
    gap, allowed, missing = evidence.slower, math.log1p(settings.max_slowdown), _untimed(evidence, settings)
    if gap is None or missing:
        if not time_is_up:
            return BakeVerdict(Decision.OPEN, f"not timed yet, {missing}; {accepted.reason}")
        return BakeVerdict(Decision.UNTIMED, f"the gate left the benchmark to the canary, and {settings.max_bake_s:.0f} s did not time it, "
                                             f"{missing}: send canary and controls more traffic, or raise rollout.max_bake_s, then promote "
                                             "it again")
    reason = f"{accepted.reason}; {_tell('time per token, log ratio', gap, allowed)} {evidence.slower_than}".rstrip()
    low, high = gap.interval(scale_of(allowed))
    if time_is_up:
        return BakeVerdict(Decision.WORSE if gap.value > allowed and low > 0 else accepted.decision, reason)
    return BakeVerdict(accepted.decision if high <= allowed else Decision.OPEN, reason)


def _untimed(evidence: Evidence, settings: RolloutSettings) -> str:
    """What a comparison of time per token lacks; "" when there is enough."""
    new, stretches = evidence.new, evidence.slower.n if evidence.slower else 0
    if new.steps < settings.min_bake_steps or new.requests < settings.min_bake_requests:
        return f"{new.steps} drafted steps of {new.requests} requests with {settings.min_bake_steps} of {settings.min_bake_requests} needed"
    if stretches < MIN_SPEED_BLOCKS:
        return f"{stretches or 'too few'} stretches of time to compare old and new in with {MIN_SPEED_BLOCKS} needed"
    return ""


def _judge_acceptance(evidence: Evidence, settings: RolloutSettings, time_is_up: bool) -> BakeVerdict:
    new, old, allowed = evidence.new, evidence.old, settings.max_drop
    if not new.steps:
        return BakeVerdict(Decision.FINE if time_is_up else Decision.OPEN, "no drafted step during the bake, so nothing was compared")
    enough = new.steps >= settings.min_bake_steps and new.requests >= settings.min_bake_requests
    seen = f"first-position acceptance {new.rate:.2f} over {new.steps} steps of {new.requests} requests"
    few = "" if enough else f" (fewer than {settings.min_bake_steps} steps of {settings.min_bake_requests} requests)"
    if old is None:
        return BakeVerdict(Decision.FINE if enough or time_is_up else Decision.OPEN, f"{seen}, nothing to compare it with{few}")
    gap = Gap(old.rate - new.rate, math.hypot(old.error, new.error), new.requests)
    low, high = gap.interval(scale_of(allowed))
    reason = f"{seen}, before {old.rate:.2f} {evidence.against}, {_tell('drop', gap, allowed)}{few}"
    if enough and low > allowed:
        return BakeVerdict(Decision.WORSE, reason)
    if time_is_up:
        is_worse = gap.value > allowed and low > 0 and new.steps >= settings.min_bake_steps / 2
        return BakeVerdict(Decision.WORSE if is_worse else Decision.FINE, reason)
    return BakeVerdict(Decision.FINE if enough and high <= allowed else Decision.OPEN, reason)


def scale_of(allowed: float) -> float:
    """The interval is sharpest at differences of the size that matters."""
    return max(allowed, 0.01)


def _tell(what: str, gap: Gap, allowed: float) -> str:
    low, high = gap.interval(scale_of(allowed))
    return f"{what} {gap.value:+.2f} [{low:+.2f}, {high:+.2f}], allowed {allowed:.2f}"
