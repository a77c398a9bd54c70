"""Remove engine builds that nobody will serve again. Knows the deployment record, what replicas report and ages; loads nothing.

The registry keeps the draft of a build longer than the build (tidy_drafts.py), so a build that went can be made again until then.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tide_pipeline.config import TideConfig
from tide_pipeline.deployment.builds import list_builds
from tide_pipeline.deployment.record import DeploymentRecord, read_observed
from tide_pipeline.rollout.history import rest_of, served_states

KEPT_DEPLOYMENTS = 20              # the last records: what was tried lately, and what its rollouts were compared with
KEPT_STATES = 8                    # served one after the other: `tide rollback` goes from one to the one before, past any number of records
SILENT_S = 7 * 86_400.0            # a replica that comes back after so long asks the record what to serve; most never do
YOUNG_S = 7 * 86_400.0             # a build of the last week may wait for its gate, or for a person


def tidy_builds(config: TideConfig, now: float) -> list[str]:
    """Ids of the builds of the target that were removed."""
    state, target = config.state, config.target
    wanted = wanted_builds(config, now)
    gone = [build for build in list_builds(state.builds, target) if build.build_id not in wanted and build.created_at < now - YOUNG_S]
    for build in gone:
        (Path(build.path) / "build.json").unlink()         # from now on it is no build, whatever happens to the rest
        shutil.rmtree(build.path)
    return [build.build_id for build in gone]


def wanted_builds(config: TideConfig, now: float) -> set[str]:
    """Of the last records and states, what replicas reported lately, and what was served first: `tide report` measures against it."""
    history = DeploymentRecord(config.state.deployments, config.target).history()
    groups = [group for deployment in history[-KEPT_DEPLOYMENTS:] for group in deployment.groups.values()]
    seen = [observed.drafts for observed in read_observed(config.state.observed, config.target).values() if observed.at >= now - SILENT_S]
    states = [*([rest_of(history[0])] if history else []), *served_states(history)[-KEPT_STATES:]]
    return {build for drafts in (*groups, *seen, *states) for build in drafts.values()}
