"""What a person may do with a rollout: begin, approve, pause, resume, abort, pin, unpin. With who and why in the record.

Beginning and approving last as long as the rollout. Whoever was killed over it says `after` which record it began, and goes on with it.
"""

from __future__ import annotations

from collections.abc import Callable

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import ANY_WORKLOAD, Deployment
from tide_pipeline.deployment.builds import load_build
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.errors import RolloutRefused
from tide_pipeline.gate.run import load_verdict
from tide_pipeline.rollout.drive import Driver, Report
from tide_pipeline.rollout.history import (
    PAUSED,
    PINNED,
    PROPOSED,
    STABLE,
    began_of,
    decide_and_append,
    held,
    is_under_way,
    new_build_of,
    rest_of,
    restored,
    workload_of,
)
from tide_pipeline.rollout.promote import promote

Change = Callable[[Deployment], Deployment]


def begin(config: TideConfig, build_id: str, *, workload: str = ANY_WORKLOAD, who: str, reason: str, after: int | None = None,
          progress: Report = lambda text: None) -> Deployment:
    """Roll out a build that somebody named, to its end, whatever rollout.mode says; `tide rollout BUILD_ID` does the same.

    `after`: number of the record on which an earlier call stood that was killed. What it began is gone on with, and not begun again once
    it has ended. Raises BuildError, GateNotPassed for a build that nobody judged, and as `promote`.
    """
    if after is not None and (begun := _begun_after(config, after, workload, build_id)) is not None:
        return _to_its_end(config, begun, who, progress)
    build = load_build(config.state.builds, config.target, build_id)
    return promote(config, build, load_verdict(config, build_id), workload=workload, who=who, reason=reason, by_person=True,
                   progress=progress)


def approve(config: TideConfig, *, who: str, reason: str, after: int | None = None,
            progress: Report = lambda text: None) -> Deployment:
    """Roll out what was proposed, to its end. Asks the gate's verdict again. A rollout that grew from a proposal is gone on with.

    `after`: number of the proposal that an earlier call approved before it was killed; a later one is not approved with it, and a rollout
    that has ended meanwhile is told as it ended. Raises RolloutRefused, and as `promote`.
    """
    latest = _record(config).latest()
    proposal = _proposal(config, latest, after)
    build_id, workload = new_build_of(proposal), workload_of(proposal)
    if latest == proposal:
        build = load_build(config.state.builds, config.target, build_id)
        return promote(config, build, load_verdict(config, build_id), workload=workload, who=who, reason=reason, progress=progress)
    if (begun := _begun_after(config, proposal.n, workload, build_id)) is None:
        raise RolloutRefused(f"build {build_id}, which deployment {proposal.n} proposed, was never rolled out, and another record stands "
                             "now: see `tide rollout history`")
    return _to_its_end(config, begun, who, progress)


def pause(config: TideConfig, *, who: str, reason: str) -> Deployment:
    """Nothing goes forward until `resume`; trouble still takes it back. Raises RolloutRefused when no rollout is under way."""
    return _change(config, lambda latest: held(_under_way(latest), PAUSED, who, reason))


def resume(config: TideConfig, *, who: str, reason: str) -> Deployment:
    """Goes on at the stage it was in, whose times begin anew."""
    def decide(latest: Deployment) -> Deployment:
        if latest.hold != PAUSED:
            raise RolloutRefused(f"deployment {latest.n} of {config.target} is not paused")
        return held(latest, "", who, reason)

    return _change(config, decide)


def abort(config: TideConfig, *, who: str, reason: str) -> Deployment:
    """End a rollout, or drop a proposal: every replica serves what it did before."""
    def decide(latest: Deployment) -> Deployment:
        if latest.stage != PROPOSED:
            _under_way(latest)
        return restored(latest, config.target, rest_of(latest), who, reason)

    return _change(config, decide)


def pin(config: TideConfig, *, who: str, reason: str) -> Deployment:
    """Keep what is served: no rollout begins until `unpin`. Going back by hand is still possible."""
    def decide(latest: Deployment) -> Deployment:
        if is_under_way(latest):
            raise RolloutRefused(f"deployment {latest.n} is being rolled out: wait for its end, or `tide rollout abort` first")
        if latest.stage == PROPOSED:
            raise RolloutRefused(f"deployment {latest.n} is a proposal: `tide rollout approve` or `tide rollout abort` it first")
        return held(latest, PINNED, who, reason)

    return _change(config, decide)


def unpin(config: TideConfig, *, who: str, reason: str) -> Deployment:
    """Rollouts may begin again."""
    def decide(latest: Deployment) -> Deployment:
        if latest.hold != PINNED:
            raise RolloutRefused(f"what serves {config.target} is not pinned")
        return held(latest, "", who, reason)

    return _change(config, decide)


def _change(config: TideConfig, change: Change) -> Deployment:
    def decide(latest: Deployment | None) -> Deployment:
        if latest is None:
            raise RolloutRefused(f"nothing of {config.target} was ever deployed")
        return change(latest)

    return decide_and_append(_record(config), decide)


def _under_way(latest: Deployment) -> Deployment:
    if not is_under_way(latest):
        raise RolloutRefused(f"no rollout of {latest.target} is under way: deployment {latest.n} is {latest.stage}")
    return latest


def _proposal(config: TideConfig, latest: Deployment | None, after: int | None) -> Deployment:
    """The one numbered `after`; else the one that stands, or that the rollout under way grew from. Raises RolloutRefused."""
    if after is None and latest is not None:
        after = began_of(latest) - 1 if is_under_way(latest) else latest.n
    found = next((d for d in _record(config).history() if d.n == after), None)
    if found is None or found.stage != PROPOSED:
        raise RolloutRefused(f"nothing is proposed for {config.target}: see `tide rollout history`")
    return found


def _begun_after(config: TideConfig, n: int, workload: str, build_id: str) -> Deployment | None:
    """The first record after n that brings the build to the workload: a canary, or where no replica was there to watch, the end itself."""
    def brings(d: Deployment) -> bool:
        if is_under_way(d):
            return (new_build_of(d), workload_of(d)) == (build_id, workload)
        return d.stage == STABLE and (rest_of(d).get(workload), d.workload) == (build_id, workload)

    return next((d for d in _record(config).history() if d.n > n and brings(d)), None)


def _to_its_end(config: TideConfig, begun: Deployment, who: str, progress: Report) -> Deployment:
    """The record that ended the rollout, now or long ago. Raises DeploymentConflict when somebody ended it."""
    return Driver(config, who).drive(began_of(begun), progress) if is_under_way(begun) else begun


def _record(config: TideConfig) -> DeploymentRecord:
    return DeploymentRecord(config.state.deployments, config.target)
