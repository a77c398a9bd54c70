"""What a rollout does next, and why. Pure: record, replicas, evidence and time in, one action out; reads and writes nothing.

    canary    every canary has served it for `bake_s` and the bake is fine            -> wider, or to all
    rolling   every chosen replica has served it for `step_s`, nothing is worse       -> wider, at last settled
    any       a replica that serves it is silent, refuses it, holds other bytes, or live traffic is worse -> back
    any       the clock was set back behind the record's: neither silence nor a bake can be timed         -> back
A pause stops what goes forward, never the way back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from tide_pipeline.config import RolloutSettings
from tide_pipeline.contracts import Deployment, ObservedState
from tide_pipeline.rollout.bake import BakeVerdict, Decision, Evidence, judge_bake
from tide_pipeline.rollout.history import CANARY, PAUSED, PINNED, PROPOSED, UNDER_WAY, settled, widened, withdrawn
from tide_pipeline.rollout.replicas import Digests, fresh, has_applied, trouble_of

QUIET_S = 4.0                      # after the bake: traffic of its end is in the log by then


class Kind(StrEnum):
    NONE = "none"                  # no rollout is under way
    WAIT = "wait"
    WIDEN = "widen"
    SETTLE = "settle"
    BACK = "back"


@dataclass(frozen=True)
class Action:
    """`replicas`: all that shall serve the new draft, when it is to be widened."""

    kind: Kind
    reason: str
    replicas: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sight:
    """What is to be seen from outside the record."""

    replicas: Mapping[str, ObservedState]
    digests: Digests
    evidence: Evidence
    now: float


def next_action(latest: Deployment | None, sight: Sight, settings: RolloutSettings) -> Action:
    """The same answer to the same question, whoever asks."""
    if latest is None or latest.stage not in UNDER_WAY:
        return Action(Kind.NONE, _at_rest(latest))
    chosen, age = latest.canary_replicas, sight.now - latest.created_at
    if age < -settings.heartbeat_s:
        return Action(Kind.BACK, f"the clock is {-age:.0f} s behind the one that deployment {latest.n} was written by")
    if troubles := _troubles(latest, sight, settings):
        return Action(Kind.BACK, "; ".join(troubles))
    if sight.evidence.error:
        return Action(Kind.WAIT, f"live traffic can't be seen: {sight.evidence.error}")
    late = [name for name in chosen if not has_applied(sight.replicas[name], latest)]
    served_s = 0.0 if late else sight.now - _served_since(latest, sight)
    baked = judge_bake(sight.evidence, settings, time_is_up=latest.stage == CANARY and served_s >= settings.max_bake_s,
                       must_time=latest.stage == CANARY and bool(latest.deferred))
    if baked.decision is Decision.WORSE:
        return Action(Kind.BACK, baked.reason)
    if latest.hold == PAUSED:
        return Action(Kind.WAIT, f"paused by {latest.who}: {latest.reason}")
    if late:
        return Action(Kind.WAIT, f"waiting for {', '.join(late)} to serve it")
    if baked.decision is Decision.UNTIMED:
        return Action(Kind.BACK, baked.reason)
    if _began_again(latest, served_s, age, settings):
        return Action(Kind.BACK, f"{', '.join(chosen)} began to serve it anew {served_s:.0f} s ago, {age:.0f} s into the bake: see its log")
    if latest.stage == CANARY and (wait := _still_bakes(latest, sight, baked, served_s, settings)):
        return Action(Kind.WAIT, wait)
    if latest.stage != CANARY and served_s < settings.step_s:
        return Action(Kind.WAIT, f"{len(chosen)} replicas serve it, the next step is {settings.step_s:.0f} s after this one")
    reason = baked.reason if sight.evidence.has_traffic else "no traffic during the bake, so nothing was compared"
    return _forward(chosen, sorted(fresh(sight.replicas, settings.heartbeat_s, sight.now)), reason, settings)


def record_of(action: Action, latest: Deployment, who: str, title: str) -> Deployment | None:
    """The record that an action asks for; None where none does. `title` names the draft and what it is for."""
    if action.kind is Kind.WIDEN:
        return widened(latest, action.replicas, who, f"{title}: {len(action.replicas)} replicas, {action.reason}")
    if action.kind is Kind.SETTLE:
        return settled(latest, who, f"{title}: {action.reason}")
    if action.kind is Kind.BACK:
        return withdrawn(latest, who, f"{title} rolled back: {action.reason}")
    return None


def next_count(served: int, total: int, steps: Sequence[float]) -> int:
    """How many replicas serve it after the next step; all of them after the last one."""
    return min(total, max(served + 1, next((n for n in sorted(math.ceil(share * total) for share in steps) if n > served), total)))


def _at_rest(latest: Deployment | None) -> str:
    if latest is None:
        return "nothing was ever deployed"
    if latest.stage == PROPOSED:
        return f"proposed, waits for a person: {latest.reason}"
    return f"pinned by {latest.who}: {latest.reason}" if latest.hold == PINNED else "no rollout is under way"


def _troubles(latest: Deployment, sight: Sight, settings: RolloutSettings) -> list[str]:
    found = (trouble_of(name, sight.replicas.get(name), latest, sight.digests, sight.now, heartbeat_s=settings.heartbeat_s,
                        timeout_s=settings.serve_timeout_s) for name in latest.canary_replicas)
    return [trouble for trouble in found if trouble]


def _served_since(latest: Deployment, sight: Sight) -> float:
    """When the last of the chosen began to serve it; those of an older version don't say, and are taken to have begun with the record."""
    return max([latest.created_at, *(sight.replicas[name].serving_since for name in latest.canary_replicas)])


def _began_again(latest: Deployment, served_s: float, age: float, settings: RolloutSettings) -> bool:
    """Whether a canary that starts anew again and again has kept the bake open for longer than one that starts late could."""
    return latest.stage == CANARY and served_s < settings.max_bake_s <= age - settings.serve_timeout_s - settings.heartbeat_s


def _still_bakes(latest: Deployment, sight: Sight, baked: BakeVerdict, served_s: float, settings: RolloutSettings) -> str:
    """Why the canary is not widened yet; "" when it is done. Without any traffic a draft goes on that the gate has timed."""
    told = f"bake {served_s:.0f} s: {baked.reason}"
    if served_s < settings.bake_s:
        return told
    speed = sum(state.tokens_per_s for state in sight.replicas.values())
    is_quiet = not sight.evidence.has_traffic and speed <= 0 and served_s >= settings.bake_s + QUIET_S and not latest.deferred
    return "" if baked.decision is Decision.FINE or is_quiet else told


def _forward(chosen: Sequence[str], live: Sequence[str], reason: str, settings: RolloutSettings) -> Action:
    others = [name for name in live if name not in chosen]
    if not others:
        return Action(Kind.SETTLE, reason)
    more = next_count(len(chosen), len(chosen) + len(others), settings.steps) - len(chosen)
    return Action(Kind.WIDEN, reason, (*chosen, *others[:more]))
