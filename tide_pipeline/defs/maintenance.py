"""What keeps the lake small and sound while nobody looks: jobs, and schedules that launch them. Knows when; the lake's own rooms know how.

Each can be launched by hand as well. All of them may be killed and run again, and go on beside writers and readers.
"""

import time

import dagster as dg

from tide_pipeline.defs.resources import TideResource
from tide_pipeline.defs.tags import BY_HAND, MAX_RUNTIME, REASON
from tide_pipeline.errors import SettingsError

MAINTENANCE = "tide/maintains"             # dagster.yaml lets one such run go at a time: they would wait for each other's lease
BUSY = dg.RetryPolicy(max_retries=2, delay=60.0)       # another host may hold the lease, or a bucket be away for a moment


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


@dg.op(description="Builds that no replica serves, and none of the last rollouts named, are removed; the registry keeps every draft.")
def tidy_builds_op(context: dg.OpExecutionContext, tide: TideResource) -> None:
    from tide_pipeline.rollout.tidy import tidy_builds

    removed = tidy_builds(tide.settings(), now=time.time())
    context.add_output_metadata({"removed_builds": removed})


compact_lake = _job(compact_lake_op, "Put the lake's small shards together.")
retain_lake = _job(retain_lake_op, "Remove what is older or more than the settings keep.")
verify_lake = _job(verify_lake_op, "Check every shard of the lake.")
tidy_builds = _job(tidy_builds_op, "Remove engine builds that are no longer needed.")

JOBS = [compact_lake, retain_lake, verify_lake, tidy_builds]
SCHEDULES = [_schedule(compact_lake, "10 * * * *"), _schedule(retain_lake, "25 3 * * *"), _schedule(verify_lake, "40 4 * * 0"),
             _schedule(tidy_builds, "55 3 * * *")]
