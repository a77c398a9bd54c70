"""Bring a build to live traffic: ask the gate again, open the rollout, drive it to its end. Loads no draft.

Killed anywhere, the last record stands: the same call goes on with it, and so does whoever else advances rollouts (drive.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import ANY_WORKLOAD, Deployment, EngineBuild, GateVerdict
from tide_pipeline.deployment.builds import load_build
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.errors import BuildError, DeploymentConflict, GateNotPassed, RolloutRefused
from tide_pipeline.gate.judge import BENCHED, DOORS
from tide_pipeline.rollout.drive import Driver, Report
from tide_pipeline.rollout.history import (
    PINNED,
    PROPOSED,
    STABLE,
    began_of,
    decide_and_append,
    following,
    is_under_way,
    new_build_of,
    opened,
    rest_of,
    workload_of,
)
from tide_pipeline.rollout.replicas import find_replicas, why_nobody
from tide_pipeline.rollout.standing import check_standing

Decide = Callable[[Deployment | None], Deployment]


@dataclass(frozen=True)
class Promotion:
    """Who wants which build to serve which workload, and why."""

    build: EngineBuild
    workload: str
    who: str
    reason: str
    first_position: float          # in the gate
    deferred: tuple[str, ...]      # doors that the gate left to the canary
    by_person: bool = False


def promote(config: TideConfig, build: EngineBuild, verdict: GateVerdict, *, workload: str = ANY_WORKLOAD, who: str, reason: str,
            by_person: bool = False, progress: Report = lambda text: None) -> Deployment:
    """Serve `build` for `workload`. Returns the record that ends the rollout: stage "stable", or "rolled_back" with why.

    `by_person`: somebody named this very build, so that it may have been taken back since its verdict.

    Raises:
        GateNotPassed: the verdict does not open every door, is of another draft, workload or champion, or the build's bytes changed since.
        RolloutRefused: what is served is pinned, the draft was taken back since its verdict, replicas have reported and none does now, or
            none ever did and one has to time it.
        DeploymentConflict: another rollout of this target is under way, or somebody ended this one.
    """
    check_verdict(config, build, verdict)
    wanted = Promotion(build, workload, who, reason, _first_position(verdict), verdict.deferred, by_person)
    begun = decide_and_append(_record(config), lambda latest: _open(config, latest, wanted))
    if not is_under_way(begun):                                        # served already, or nobody there to watch
        return begun
    progress(f"canary on {', '.join(begun.canary_replicas)}: {build.draft_version}")
    return Driver(config, who).drive(began_of(begun), progress)


def propose(config: TideConfig, build: EngineBuild, verdict: GateVerdict, *, workload: str = ANY_WORKLOAD, who: str,
            reason: str) -> Deployment:
    """Write down that `build` could serve `workload`; a later proposal takes its place. Raises as `promote`."""
    check_verdict(config, build, verdict)

    def decide(latest: Deployment | None) -> Deployment:
        _refuse_if_held(latest)
        is_proposed = latest is not None and latest.stage == PROPOSED and _brings(latest, workload, build.build_id)
        if latest is not None and (is_proposed or _is_served(latest, workload, build.build_id)):
            return latest
        check_standing(config, latest, build, workload)
        return opened(latest, config.target, workload, build.build_id, (), who,
                      f"{reason}; {build.draft_version} for {workload!r} passed the gate: approve it, or leave it",
                      _first_position(verdict), verdict.deferred)

    return decide_and_append(_record(config), decide)


def check_verdict(config: TideConfig, build: EngineBuild, verdict: GateVerdict) -> None:
    """Ask the gate again at the door; a verdict that only says "passed" opens nothing."""
    closed = [name for name in DOORS if verdict.doors.get(name, {}).get("passed") is not True]
    if closed or not verdict.passed:
        raise GateNotPassed(f"{build.draft_version} did not pass the gate ({', '.join(closed) or 'no verdict'}): {verdict.reasons}")
    if verdict.challenger_digest != build.draft_digest:
        raise GateNotPassed(f"the verdict is about draft {verdict.challenger_digest[:12]}, build {build.build_id} holds "
                            f"{build.draft_digest[:12]}: run `tide gate` on this build")
    if bool(verdict.deferred) == (build.backend in BENCHED):
        told = "left to the canary" if verdict.deferred else "measured by the gate"
        raise GateNotPassed(f"the benchmark of {build.draft_version} was {told}, which is not how builds for backend {build.backend!r} are "
                            "judged: run `tide gate` on this build")
    try:
        found = load_build(config.state.builds, config.target, build.build_id)
    except BuildError as error:
        raise GateNotPassed(f"what passed the gate is no longer there: {error}") from error
    if found.draft_digest != build.draft_digest:
        raise GateNotPassed(f"build {build.build_id} on disk is another draft than the one that was judged: run `tide gate` again")


def _open(config: TideConfig, latest: Deployment | None, wanted: Promotion) -> Deployment:
    """The canary record: a new one, or the one that a killed rollout of this build left."""
    build, workload = wanted.build, wanted.workload
    if latest is not None and is_under_way(latest) and _brings(latest, workload, build.build_id):
        return latest
    _refuse_if_held(latest)
    if latest is not None and _is_served(latest, workload, build.build_id):
        return latest
    check_standing(config, latest, build, workload, by_person=wanted.by_person)
    title, live = f"{wanted.reason}; {build.draft_version} for {workload!r}", find_replicas(config)
    if live:
        canaries = live[: max(1, min(config.rollout.canaries, len(live) - 1))]
        return opened(latest, config.target, workload, build.build_id, canaries, wanted.who,
                      f"{title}: canary on {', '.join(canaries)} of {len(live)}", wanted.first_position, wanted.deferred)
    if why := why_nobody(config):
        raise RolloutRefused(why)
    if wanted.deferred:
        raise RolloutRefused(f"the gate left the benchmark of {build.draft_version} to a canary, and no replica of {config.target} has "
                             "ever reported: start one on the draft that the engine ships, send it traffic, then promote this one")
    return following(latest, config.target, {"rest": {**rest_of(latest), workload: build.build_id}}, (), STABLE, wanted.who,
                     f"{title}: no replica was live, so nothing was watched", workload=workload, first_position=wanted.first_position)


def _refuse_if_held(latest: Deployment | None) -> None:
    if latest is not None and is_under_way(latest):
        raise DeploymentConflict(f"deployment {latest.n} by {latest.who} is under way ({latest.reason}): "
                                 "try again when it has ended, or end it with `tide rollout abort`")
    if latest is not None and latest.hold == PINNED:
        raise RolloutRefused(f"what serves {latest.target} was pinned by {latest.who} ({latest.reason}): `tide rollout unpin` first")


def _is_served(latest: Deployment | None, workload: str, build_id: str) -> bool:
    return rest_of(latest).get(workload) == build_id and not is_under_way(latest)


def _first_position(verdict: GateVerdict) -> float:
    """What the draft's acceptance may be held against once it is live; 0 where the gate did not say."""
    return float(verdict.doors["offline"].get("challenger_first_position") or 0.0)


def _brings(latest: Deployment, workload: str, build_id: str) -> bool:
    """Whether its rollout, or its proposal, is of this build for this workload."""
    return (new_build_of(latest), workload_of(latest)) == (build_id, workload)


def _record(config: TideConfig) -> DeploymentRecord:
    return DeploymentRecord(config.state.deployments, config.target)
