"""May the new draft stay? Numbers in, decision out. Pure: knows no record, no clock and no lake.

First-position acceptance decides: the new draft is fine when it is certainly not worse than allowed, and worse when it certainly is.
Time per token and errors can only send it back. "Certainly" is meant at every look at once (sequential.py), so that a draft that is no
worse is rolled back in at most `FALSE_ROLLBACKS` of all rollouts, however often somebody looks.
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
    slower: Gap | None = None              # log of the time per token, new over old, at the same time; None for a single replica
    errors: Gap | None = None              # share of requests that ended with an error
    has_traffic: bool = False              # whether the replicas with the new draft answered anything
    error: str = ""                        # why the log could not be read: nothing goes forward then


def judge_bake(evidence: Evidence, settings: RolloutSettings, *, time_is_up: bool = False) -> BakeVerdict:
    """When time is up, what is still open stays, unless it fell by more than allowed and certainly fell at all."""
    for gap, allowed, least, what in ((evidence.slower, math.log1p(settings.max_slowdown), MIN_SPEED_BLOCKS, "time per token, log ratio"),
                                      (evidence.errors, settings.max_error_rise, MIN_FINISHED, "share of errors, rise")):
        if gap is not None and gap.n >= least and gap.interval(scale_of(allowed))[0] > allowed:
            return BakeVerdict(Decision.WORSE, _tell(what, gap, allowed))
    return _judge_acceptance(evidence, settings, time_is_up)


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
