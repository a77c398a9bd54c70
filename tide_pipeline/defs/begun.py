"""What a run that somebody launched is tagged with once it has begun: what for, why, and how long it may take. Knows tags and the record.

What its launcher said stays.
"""

from collections.abc import Mapping

import dagster as dg

from tide_pipeline.config import TideConfig
from tide_pipeline.defs.limits import rollout_tags
from tide_pipeline.defs.tags import AFTER, BY_HAND, REASON, RETRY, TARGET, WORKLOAD
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.rollout.history import PROPOSED, began_of, is_under_way, workload_of


def tag_begun(instance: dg.DagsterInstance, run: dg.DagsterRun, wanted: Mapping[str, str], reason: str) -> None:
    """What is not known ("") is left out; a reason that nobody gave gives way to this one."""
    tags = {name: value for name, value in wanted.items() if value and name not in run.tags}
    if reason and run.tags.get(REASON, BY_HAND) == BY_HAND:
        tags[REASON] = reason
    if tags:
        instance.add_run_tags(run.run_id, tags)


def rollout_begins(context: dg.OpExecutionContext, settings: TideConfig, reason: str, workload: str = "") -> int | None:
    """Tags the run. Returns what `after` means in rollout/by_hand.py, for a run that goes on with one that was killed; else None.

    A person who launches a run again means a rollout of its own, though Dagster copies the tags.
    """
    run, latest = context.run, DeploymentRecord(settings.state.deployments, settings.target).latest()
    if not workload and latest is not None and (latest.stage == PROPOSED or is_under_way(latest)):
        workload = workload_of(latest)
    tag_begun(context.instance, run, {TARGET: settings.target, WORKLOAD: workload, **rollout_tags(settings)}, reason)
    if RETRY in run.tags and AFTER in run.tags:
        return int(run.tags[AFTER])
    stood = 0 if latest is None else began_of(latest) - 1 if is_under_way(latest) else latest.n      # of one under way, what came before it
    context.instance.add_run_tags(run.run_id, {AFTER: str(stood)})
    return None
