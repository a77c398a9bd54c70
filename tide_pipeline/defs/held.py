"""What a rollout or a person has to decide before another draft is worth training. Knows the deployment record and tags of runs.

Loads no draft and asks no gate: the step that deploys (or does not) leaves the build that passed as a tag of its run.
"""

from __future__ import annotations

from datetime import UTC, datetime

import dagster as dg

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import Deployment
from tide_pipeline.defs.tags import PASSED, TARGET, WORKLOAD
from tide_pipeline.deployment.builds import read_build
from tide_pipeline.errors import BuildError
from tide_pipeline.rollout.history import PAUSED, PINNED, PROPOSED, is_under_way, new_build_of, rest_of, workload_of

MOST_RUNS = 50                     # of an episode: attempts, their re-executions, those by hand


def why_held(instance: dg.DagsterInstance, config: TideConfig, latest: Deployment | None, workload: str, since: float) -> str:
    """What keeps a draft for `workload` from being deployed once it is trained, or has kept one since `since`; "" for nothing."""
    from tide_pipeline.rollout.mode import Mode, mode_of

    mode, is_pinned = mode_of(config), latest is not None and latest.hold == PINNED
    if latest is not None and (is_under_way(latest) or (latest.stage == PROPOSED and mode is Mode.PROPOSE)):
        return f"drifted, but {_undecided(latest)}"
    if mode is not Mode.OBSERVE and not is_pinned:
        return ""
    build_id = passed_since(instance, config, workload, since)
    if not build_id or build_id in rest_of(latest).values():
        return ""
    if latest is not None and is_pinned:
        return (f"drifted, and build {build_id} passed the gate, but what is served is pinned by {latest.who} ({latest.reason}): "
                f"`tide rollout unpin`, then `tide rollout {build_id}`")
    return (f"drifted, and build {build_id} passed the gate, but rollout.mode is observe: deploy it with `tide rollout {build_id}`, "
            "or launch adapt_draft by hand for another")


def passed_since(instance: dg.DagsterInstance, config: TideConfig, workload: str, since: float) -> str:
    """The newest build for `workload` that passed the gate in a run launched since then and is still there; "" for none."""
    wanted = dg.RunsFilter(tags={TARGET: config.target, WORKLOAD: workload}, created_after=datetime.fromtimestamp(since, UTC))
    passed = (run.tags[PASSED] for run in instance.get_runs(wanted, limit=MOST_RUNS) if PASSED in run.tags)
    return next((build_id for build_id in passed if _is_there(config, build_id)), "")


def _undecided(latest: Deployment) -> str:
    build_id, workload = new_build_of(latest), workload_of(latest)
    if latest.stage == PROPOSED:
        return (f"deployment {latest.n} proposes build {build_id} for {workload!r}, and another would take its place: "
                "launch approve_rollout, or drop it with `tide rollout abort`")
    if latest.hold == PAUSED:
        return (f"the rollout of build {build_id} for {workload!r} is paused by {latest.who} ({latest.reason}): "
                "`tide rollout resume`, or `tide rollout abort`")
    return f"build {build_id} is being rolled out for {workload!r}"


def _is_there(config: TideConfig, build_id: str) -> bool:
    """Maintenance removes builds that nobody deployed."""
    try:
        return bool(read_build(config.state.builds, config.target, build_id))
    except BuildError:
        return False
