"""What `drift.policy` says now: the recorded slots of the last hour or two, through the rule of that name. Knows the log; decides nothing.

Only slots whose rows are all there are looked at: writers keep rows for `capture.flush_s`. Slots are remembered for the next look, but for
the last `recent_s` of them, which is read again: rows that come later than that are seen by a process that starts after them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tide_pipeline.config import TideConfig
from tide_pipeline.drift.policies import POLICIES, remembers_since
from tide_pipeline.drift.promoted import Early
from tide_pipeline.drift.replay import Key, recorded
from tide_pipeline.drift.slots import Slot

SLOT_S = 5.0
LEAD_S = 120.0                     # a request that ends in a slot may have begun so long before: all its steps count there


@dataclass(frozen=True, slots=True)
class Said:
    """By a policy of one workload."""

    policy: str
    has_fired: bool
    why: str                       # or why not, with the numbers


@dataclass(frozen=True, slots=True)
class _Seen:
    """All slots that ended after `since` and not after `until`."""

    since: float
    until: float
    slots: tuple[tuple[Key, Slot], ...]


_seen: dict[tuple[str, str], _Seen] = {}


def watch(config: TideConfig, now: float, earlies: Mapping[Key, Early]) -> dict[Key, Said]:
    """Of workloads on draft versions with a complete early life. Raises LakeError."""
    until = (now - config.capture.flush_s) // SLOT_S * SLOT_S
    name, make = config.drift.policy, POLICIES[config.drift.policy]
    rules = {key: make(config.drift, config.capture, early.estimate) for key, early in earlies.items()}
    fed: set[Key] = set()
    for key, slot in _slots(config, remembers_since(until), until) if rules else ():
        if key in rules and slot.time - SLOT_S >= earlies[key].until:
            rules[key].take(slot)
            fed.add(key)
    nothing = f"no request has ended after the baseline and more than {now - until:.0f} s ago"
    return {key: Said(name, rule.fires, rule.says) if key in fed else Said(name, False, nothing) for key, rule in rules.items()}


def _slots(config: TideConfig, since: float, until: float) -> list[tuple[Key, Slot]]:
    """That ended after `since` and not after `until`, in order of time."""
    key = str(config.state.acceptance), config.target
    seen = _seen.get(key)
    is_later = seen is not None and seen.since <= since and seen.until <= until
    begin = max(since, seen.until) if seen is not None and is_later else since
    known = [each for each in seen.slots if each[1].time > since] if seen is not None and is_later else []
    slots = known + [each for each in recorded(config, begin - LEAD_S, until, SLOT_S) if begin < each[1].time <= until]
    settled = (until - config.drift.recent_s) // SLOT_S * SLOT_S
    if (seen is None or is_later) and settled > since:
        _seen[key] = _Seen(since, settled, tuple(each for each in slots if each[1].time <= settled))
    return slots
