"""The way back: one record that restores what was served before. Knows the record and whether builds are whole."""

from __future__ import annotations

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import Deployment
from tide_pipeline.deployment.builds import load_build
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.errors import NothingToRollBack
from tide_pipeline.rollout.history import PROPOSED, Drafts, decide_and_append, is_under_way, rest_of, restored, served_states


def rollback(config: TideConfig, *, who: str, reason: str) -> Deployment:
    """End a rollout that is under way, or restore what was served before the last one; again goes one further back.

    Raises:
        NothingToRollBack: there is no earlier state.
        BuildError: a build of the earlier state is gone or altered; nothing was changed.
    """
    record = DeploymentRecord(config.state.deployments, config.target)

    def decide(latest: Deployment | None) -> Deployment:
        before = _before(record, latest)
        for build_id in before.values():
            load_build(config.state.builds, config.target, build_id)
        return restored(latest, config.target, before, who, reason)

    return decide_and_append(record, decide)


def _before(record: DeploymentRecord, latest: Deployment | None) -> Drafts:
    if latest is None:
        raise NothingToRollBack(f"nothing of {record.target} was ever deployed")
    if is_under_way(latest) or latest.stage == PROPOSED:
        return rest_of(latest)
    states = served_states([d for d in record.history() if d.n <= latest.n])
    if len(states) < 2:
        raise NothingToRollBack(f"deployment {latest.n} of {record.target} serves the first draft there was: nothing came before it")
    return states[-2]
