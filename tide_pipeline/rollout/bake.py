"""May the canary stay? Numbers in, decision out. Pure: knows no record, no clock and no lake."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from tide_pipeline.config import RolloutSettings
from tide_pipeline.rollout.live import Rate

Z_95 = 1.96


class Decision(StrEnum):
    FINE = "fine"                  # certainly not worse than allowed
    WORSE = "worse"                # certainly worse than allowed
    OPEN = "open"                  # more traffic would tell


@dataclass(frozen=True)
class BakeVerdict:
    """What is known so far, in one sentence with the numbers."""

    decision: Decision
    reason: str


def judge_bake(baseline: Rate | None, canary: Rate, settings: RolloutSettings, *, time_is_up: bool = False) -> BakeVerdict:
    """Compare first-position acceptance of the new draft with what it replaces (None: nothing to compare with).

    Open as long as the interval of the drop lies across `max_drop`; when time is up its middle decides, and a canary that
    had too few steps stays unless it is certainly worse.
    """
    enough = canary.steps >= settings.min_bake_steps
    if not canary.steps:
        return BakeVerdict(Decision.FINE if time_is_up else Decision.OPEN, "no drafted step during the bake, so nothing was compared")
    seen = f"first-position acceptance {canary.rate:.2f} over {canary.steps} steps"
    if baseline is None:
        note = f"{seen}, nothing to compare it with" + ("" if enough else f" (fewer than {settings.min_bake_steps} steps)")
        return BakeVerdict(Decision.FINE if enough or time_is_up else Decision.OPEN, note)
    drop, width = baseline.rate - canary.rate, Z_95 * math.hypot(baseline.error, canary.error)
    reason = (f"{seen}, before {baseline.rate:.2f}, drop {drop:+.2f} [{drop - width:+.2f}, {drop + width:+.2f}], "
              f"allowed {settings.max_drop:.2f}")
    if not enough:
        certainly = canary.steps >= settings.min_bake_steps / 2 and drop - width > settings.max_drop
        reason += f" (fewer than {settings.min_bake_steps} steps)"
        return BakeVerdict(Decision.OPEN if not time_is_up else Decision.WORSE if certainly else Decision.FINE, reason)
    if drop - width > settings.max_drop or (time_is_up and drop > settings.max_drop):
        return BakeVerdict(Decision.WORSE, reason)
    return BakeVerdict(Decision.FINE if drop + width <= settings.max_drop or time_is_up else Decision.OPEN, reason)
