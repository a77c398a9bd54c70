"""What keeps lake, builds and registry small and sound while nobody looks: jobs, and schedules that launch them. Knows when, not how.

Each can be launched by hand as well. All of them may be killed and run again, and go on beside writers and readers.
"""

import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import dagster as dg

from tide_pipeline.defs.resources import TideResource
from tide_pipeline.defs.tags import BY_HAND, MAX_RUNTIME, REASON
from tide_pipeline.errors import SettingsError

if TYPE_CHECKING:
    from tide_pipeline.rollout.tidy_drafts import InUse

MAINTENANCE = "tide/maintains"             # dagster.yaml lets one such run go at a time: they would wait for each other's lease
BUSY = dg.RetryPolicy(max_retries=2, delay=60.0)       # another host may hold the lease, or a bucket be away for a moment
ENDED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]
AGAIN = timedelta(days=1)                  # a run that has ended may be re-executed from where it failed


def _job(op: dg.OpDefinition, description: str) -> dg.JobDefinition:
    @dg.job(name=op.name.removesuffix("_op"), executor_def=dg.in_process_executor, description=description,
            tags={MAX_RUNTIME: "7200", REASON: BY_HAND, MAINTENANCE: "lake"})
    def made() -> None:
        op()

    return made


def _schedule(job: dg.JobDefinition, cron: str) -> dg.ScheduleDefinition:
    return dg.ScheduleDefinition(name=f"{job.name}_schedule", job=job, cron_schedule=cron, execution_timezone="UTC",
                                 tags={REASON: f"schedule {cron} UTC"}, default_status=dg.DefaultScheduleStatus.RUNNING)


@dg.op(description="Small shards of each hour become large ones; late deletions are carried out.", retry_policy=BUSY)
def compact_lake_op(context: dg.OpExecutionContext, tide: TideResource) -> None:
    from tide_pipeline.capture.compact import compact

    done = compact(tide.settings().state.lake)
    context.add_output_metadata({"compacted_shards": done.compacted_shards, "new_shards": done.new_shards,
                                 "removed_files": done.removed_files, "damaged": [file.uri for file, _ in done.damaged]})


@dg.op(description="What the settings' table [retention] lets go of is removed, and every deletion that was asked for.", retry_policy=BUSY)
def retain_lake_op(context: dg.OpExecutionContext, tide: TideResource) -> None:
    from tide_pipeline.capture.retain import Retention, retain

    settings = tide.settings()
    try:
        keep = Retention.of(settings.retention)
    except SettingsError as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    done = retain(settings.state.lake, keep)
    context.add_output_metadata({"expired_shards": done.expired_shards, "removed_files": done.removed_files,
                                 **{f"left_bytes_{name}": size for name, size in done.left_bytes.items()}})


@dg.op(description="Every byte of both datasets is read and held against its checksums and the served target; what is wrong fails the run.")
def verify_lake_op(context: dg.OpExecutionContext, tide: TideResource) -> None:
    from tide_pipeline.training.lake_check import check_lake

    found = check_lake(tide.settings())
    told = [f"{finding.kind}: {finding.detail} ({finding.shard})" for part in found.values() for finding in part.findings]
    context.add_output_metadata({**{f"shards_{name}": part.shards for name, part in found.items()}, "findings": told[:100]})
    if not all(part.is_sound for part in found.values()):
        raise dg.Failure(f"{len(told)} findings, the first: {told[0]}; training leaves such shards out, `tide signals verify` lists all",
                         allow_retries=False)


@dg.op(description="Builds that no replica serves, and none of the last rollouts named, are removed; their drafts stay in the registry.")
def tidy_builds_op(context: dg.OpExecutionContext, tide: TideResource) -> None:
    from tide_pipeline.rollout.tidy import tidy_builds

    removed = tidy_builds(tide.settings(), now=time.time())
    context.add_output_metadata({"removed_builds": removed})


class TidyConfig(dg.Config):
    """Whether anything is removed."""

    only_look: bool = False


@dg.op(description="Drafts in MLflow and weights in training/ that nobody needs, as [retention] says, are removed; their records stay.",
       retry_policy=BUSY)
def tidy_drafts_op(context: dg.OpExecutionContext, config: TidyConfig, tide: TideResource) -> None:
    from tide_pipeline.registry.registry import open_registry
    from tide_pipeline.rollout.tidy_drafts import tidy_drafts

    settings = tide.settings()
    try:
        done = tidy_drafts(settings, open_registry(settings), in_use(context.instance), time.time(), only_look=config.only_look)
    except SettingsError as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    context.add_output_metadata({"versions": list(done.versions), "runs_given_up": done.given_up, "kept": dict(done.kept or {}),
                                 "adaptations": list(done.adaptations), "freed_bytes": done.freed_bytes, "removed": not config.only_look})


def in_use(instance: dg.DagsterInstance) -> "InUse":
    """Runs that have not ended, or in the last day, with what they were launched for."""
    from tide_pipeline.rollout.tidy_drafts import InUse

    going = instance.get_runs(dg.RunsFilter(statuses=[status for status in dg.DagsterRunStatus if status not in ENDED]))
    runs = [*going, *instance.get_runs(dg.RunsFilter(updated_after=datetime.now(UTC) - AGAIN))]
    configs: list[Any] = [run.run_config for run in runs]
    asked = (config.get("ops", {}).get("draft_engine", {}).get("config", {}).get("version", 0) for config in configs)
    return InUse(frozenset({run.run_id for run in runs} | {run.root_run_id for run in runs if run.root_run_id}),
                 frozenset(version for version in asked if version))


compact_lake = _job(compact_lake_op, "Put the lake's small shards together.")
retain_lake = _job(retain_lake_op, "Remove what is older or more than the settings keep.")
verify_lake = _job(verify_lake_op, "Check every shard of the lake.")
tidy_builds = _job(tidy_builds_op, "Remove engine builds that are no longer needed.")
tidy_drafts = _job(tidy_drafts_op, "Remove drafts in MLflow and weights of old adaptations that are no longer needed, by [retention].")

JOBS = [compact_lake, retain_lake, verify_lake, tidy_builds, tidy_drafts]
SCHEDULES = [_schedule(compact_lake, "10 * * * *"), _schedule(retain_lake, "25 3 * * *"), _schedule(verify_lake, "40 4 * * 0"),
             _schedule(tidy_builds, "55 3 * * *"), _schedule(tidy_drafts, "10 4 * * *")]      # a build that went keeps its draft no more
