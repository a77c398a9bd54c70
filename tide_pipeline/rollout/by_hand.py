"""What a person may do with a rollout: approve, pause, resume, abort, pin, unpin. One record each, with who and why."""

from __future__ import annotations

from collections.abc import Callable

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import Deployment
from tide_pipeline.deployment.builds import load_build
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.errors import RolloutRefused
from tide_pipeline.gate.run import load_verdict
from tide_pipeline.rollout.drive import Report
from tide_pipeline.rollout.history import (
    PAUSED,
    PINNED,
    PROPOSED,
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


def approve(config: TideConfig, *, who: str, reason: str, progress: Report = lambda text: None) -> Deployment:
    """Roll out what was proposed, to its end. Asks the gate's verdict again. Raises RolloutRefused, and as `promote`."""
    latest = _record(config).latest()
    if latest is None or latest.stage != PROPOSED:
        raise RolloutRefused(f"nothing is proposed for {config.target}: see `tide rollout history`")
    build = load_build(config.state.builds, config.target, new_build_of(latest))
    return promote(config, build, load_verdict(config, build.build_id), workload=workload_of(latest), who=who, reason=reason,
                   progress=progress)


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


def _record(config: TideConfig) -> DeploymentRecord:
    return DeploymentRecord(config.state.deployments, config.target)
