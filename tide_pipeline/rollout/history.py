"""The records of a rollout: how each follows from the one before, and what was served before. Pure; knows no builds, no replicas.

    stable n      rest = old
    proposed n+1  rest = old, canary = new, for nobody yet        mode "propose": a person approves it, or another one takes its place
    canary n+2    rest = old, canary = new, for the canaries      bake on live traffic
    rolling n+3   the same, for more replicas                     once for each step, the last time for all
    stable n+4    rest = new                                      or rolled_back, rest = old, with the reason
The record is the only state: whoever reads it can go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from tide_pipeline.contracts import ANY_WORKLOAD, Deployment
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.errors import DeploymentConflict

PROPOSED, CANARY, ROLLING, STABLE, ROLLED_BACK = "proposed", "canary", "rolling", "stable", "rolled_back"
UNDER_WAY = (CANARY, ROLLING)
PAUSED, PINNED = "paused", "pinned"
ATTEMPTS = 5

Drafts = dict[str, str]            # workload tag -> build id


def decide_and_append(record: DeploymentRecord, decide: Callable[[Deployment | None], Deployment]) -> Deployment:
    """Append what `decide` makes of the latest record; read again and decide again when somebody else was faster.

    `decide` may give back the latest record itself: then nothing has to be written.
    """
    for attempt in range(ATTEMPTS):
        latest = record.latest()
        wanted = decide(latest)
        if latest is not None and wanted.n == latest.n:
            return latest
        try:
            return record.append(wanted)
        except DeploymentConflict:
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


# --- what follows -------------------------------------------------------------------------------------------------

def following(latest: Deployment | None, target: str, groups: dict[str, Drafts], replicas: Iterable[str], stage: str, who: str,
              reason: str, *, workload: str = "", began: int = 0, hold: str = "", first_position: float = 0.0,
              deferred: tuple[str, ...] = ()) -> Deployment:
    """The record after `latest`."""
    return Deployment(next_n(latest), target, groups, tuple(replicas), stage, who, reason, time.time(), workload, began, hold,
                      first_position, deferred)


def opened(latest: Deployment | None, target: str, workload: str, build_id: str, canaries: Sequence[str], who: str,
           reason: str, first_position: float = 0.0, deferred: tuple[str, ...] = ()) -> Deployment:
    """A canary, or without canaries a proposal. `first_position`: what the gate found of it; `deferred`: what it left to the canary."""
    old = rest_of(latest)
    return following(latest, target, {"rest": old, "canary": {**old, workload: build_id}}, canaries, CANARY if canaries else PROPOSED,
                     who, reason, workload=workload, began=next_n(latest), first_position=first_position, deferred=deferred)


def widened(latest: Deployment, replicas: Iterable[str], who: str, reason: str) -> Deployment:
    """More replicas serve the new drafts."""
    return following(latest, latest.target, latest.groups, replicas, ROLLING, who, reason, workload=workload_of(latest),
                     began=began_of(latest), first_position=latest.first_position, deferred=latest.deferred)


def settled(latest: Deployment, who: str, reason: str) -> Deployment:
    """The new drafts are what is served from now on."""
    return following(latest, latest.target, {"rest": dict(latest.groups["canary"])}, (), STABLE, who, reason,
                     workload=workload_of(latest), began=began_of(latest), first_position=latest.first_position)


def withdrawn(latest: Deployment, who: str, reason: str) -> Deployment:
    """The rollout ended by its own rules: the old drafts everywhere."""
    return following(latest, latest.target, {"rest": rest_of(latest)}, (), ROLLED_BACK, who, reason, workload=workload_of(latest),
                     began=began_of(latest))


def restored(latest: Deployment | None, target: str, drafts: Drafts, who: str, reason: str) -> Deployment:
    """Somebody puts `drafts` back for every replica. What was pinned stays so."""
    hold = PINNED if latest is not None and latest.hold == PINNED else ""
    return following(latest, target, {"rest": drafts}, (), ROLLED_BACK, who, reason, hold=hold)


def held(latest: Deployment, hold: str, who: str, reason: str) -> Deployment:
    """The same with another hold ("" lets go)."""
    return replace(latest, n=latest.n + 1, who=who, reason=reason, created_at=time.time(), hold=hold)


# --- what a record says --------------------------------------------------------------------------------------------

def next_n(latest: Deployment | None) -> int:
    return latest.n + 1 if latest else 1


def rest_of(latest: Deployment | None) -> Drafts:
    """What is served outside of any rollout."""
    return dict(latest.groups["rest"]) if latest else {}


def is_under_way(latest: Deployment | None) -> bool:
    return latest is not None and latest.stage in UNDER_WAY


def began_of(latest: Deployment) -> int:
    """Number of the record that opened the rollout; records of older versions don't tell, there it is the canary itself."""
    return latest.began or latest.n


def workload_of(latest: Deployment) -> str:
    """The tag whose draft the rollout changes."""
    if latest.workload:
        return latest.workload
    rest = rest_of(latest)
    return next((tag for tag, build in latest.groups.get("canary", {}).items() if rest.get(tag) != build), ANY_WORKLOAD)


def new_build_of(latest: Deployment) -> str:
    """Build id that the rollout brings; "" outside of one."""
    return latest.groups.get("canary", {}).get(workload_of(latest), "")


def build_serving(rest: Drafts, workload: str) -> str:
    """Its own build, or the one for everybody; "" for none."""
    return rest.get(workload) or rest.get(ANY_WORKLOAD, "")


def taken_back(history: Sequence[Deployment], workload: str, build_id: str, since: float) -> Deployment | None:
    """The last record after `since` (Unix seconds) by which a build went that was served, rolled out or proposed for the workload."""
    for before, after in zip(history[-2::-1], history[:0:-1], strict=True):
        brought = (new_build_of(before), workload_of(before)) == (build_id, workload) or rest_of(before).get(workload) == build_id
        if brought and after.stage == ROLLED_BACK and rest_of(after).get(workload) != build_id and after.created_at > since:
            return after
    return None


def served_states(history: Sequence[Deployment]) -> list[Drafts]:
    """What was stably served, oldest first; the last one counts now. What was rolled back from is no longer in it."""
    states: list[Drafts] = [rest_of(history[0])] if history else []
    for deployment in history:
        rest = rest_of(deployment)
        if deployment.stage == STABLE and states[-1] != rest:
            states.append(rest)
        if deployment.stage == ROLLED_BACK:
            while states and states[-1] != rest:
                states.pop()
            states = states or [rest]
    return states
