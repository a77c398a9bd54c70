"""What can be launched: one adaptation, a challenger's trial, a rollout by hand, approval, the way back, a look at the lake.

Steps share a process; training has its own.
"""

import time

import dagster as dg

from tide_pipeline.contracts import ANY_WORKLOAD
from tide_pipeline.defs.begun import rollout_begins, tag_begun
from tide_pipeline.defs.hours import hour_of, look_at_hour
from tide_pipeline.defs.keys import named
from tide_pipeline.defs.lake import HOURS, look
from tide_pipeline.defs.resources import TideResource
from tide_pipeline.defs.tags import BY_HAND, MAX_RUNTIME, REASON
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.errors import BuildError, RegistryError

# A run whose worker was killed is run again from the step that was cut off (dagster.yaml: not one whose step failed).
RESUMED = {"dagster/max_retries": "2", "dagster/retry_strategy": "FROM_FAILURE"}

adapt_draft = dg.define_asset_job(
    "adapt_draft", named("draft_checkpoint", "registered_draft", "draft_engine", "benchmark_report", "live_draft"),
    executor_def=dg.in_process_executor, tags={REASON: BY_HAND, **RESUMED},      # how long it may take: limits.py
    description="Train a draft on what was captured (of a past window, with `since` and `until`), register and build it, prove it against "
                "the champion, roll it out.")


judge_challenger = dg.define_asset_job(
    "judge_challenger", named("draft_engine", "benchmark_report", "live_draft"),
    executor_def=dg.in_process_executor, tags={REASON: BY_HAND, **RESUMED},
    description="Put a registered version before the gate and, if it passes, do with it what rollout.mode says: for an alias that was "
                "moved by hand, or with draft_engine's `version` filled in.")


class PromotionConfig(dg.Config):
    """Which build shall serve which workload, and why."""

    build_id: str
    workload: str = ANY_WORKLOAD           # a tag; * is every tag without a draft of its own
    reason: str = "by hand"


@dg.op(description="Roll out a build that passed the gate, in any mode; asks the gate's verdict again.")
def promote_build(context: dg.OpExecutionContext, config: PromotionConfig, tide: TideResource) -> int:
    from tide_pipeline.rollout.by_hand import begin

    settings = tide.settings()
    after = rollout_begins(context, settings, config.reason, config.workload)
    done = begin(settings, config.build_id, workload=config.workload, who=who_runs(context), reason=config.reason, after=after,
                 progress=context.log.info)
    if done.groups["rest"].get(config.workload) != config.build_id:
        raise dg.Failure(f"deployment {done.n} is {done.stage}: {done.reason}", allow_retries=False)
    return done.n


class ApprovalConfig(dg.Config):
    """Why what was proposed is rolled out."""

    reason: str = "approved by hand"


@dg.op(description="Roll out what the deployment record proposes; asks the gate's verdict again.")
def approve_proposal(context: dg.OpExecutionContext, config: ApprovalConfig, tide: TideResource) -> int:
    from tide_pipeline.rollout.by_hand import approve

    settings = tide.settings()
    after = rollout_begins(context, settings, config.reason)
    done = approve(settings, who=who_runs(context), reason=config.reason, after=after, progress=context.log.info)
    if done.stage != "stable":
        raise dg.Failure(f"deployment {done.n} is {done.stage}: {done.reason}", allow_retries=False)
    return done.n


class RollbackConfig(dg.Config):
    """Why the last rollout is undone."""

    reason: str = BY_HAND


@dg.op(description="Put back what was served before the last rollout.")
def roll_back(context: dg.OpExecutionContext, config: RollbackConfig, tide: TideResource) -> int:
    from tide_pipeline.rollout import rollback

    settings = tide.settings()
    tag_begun(context.instance, context.run, {}, config.reason)        # no target: launched again, it would queue behind what it undoes
    deployment = rollback(settings, who=who_runs(context), reason=config.reason)
    context.log.info(f"deployment {deployment.n} serves {deployment.groups['rest']}")
    return deployment.n


@dg.op(description="Let MLflow's champion alias follow what is served. A step of its own: serving does not wait for MLflow.")
def follow_champion(context: dg.OpExecutionContext, deployment: int, tide: TideResource) -> None:
    from tide_pipeline.registry.registry import open_registry
    from tide_pipeline.rollout.alias import follow_alias

    config = tide.settings()
    latest = DeploymentRecord(config.state.deployments, config.target).latest()
    if latest is None:
        return
    try:
        context.log.info(f"after deployment {deployment}: {follow_alias(config, open_registry(config), latest)}")
    except (RegistryError, BuildError) as error:           # what is served was changed; alias_sensor looks every 30 s
        context.log.warning(f"after deployment {deployment} aliases were not moved, the sensor will: {error}")


def who_runs(context: dg.OpExecutionContext) -> str:
    """For the deployment record."""
    return f"dagster run {context.run.run_id[:8]}"


@dg.job(executor_def=dg.in_process_executor, tags={REASON: BY_HAND, **RESUMED},
        description="Any mode: roll out a build that passed the gate, by its id. What `tide rollout BUILD_ID` does.")
def promote() -> None:
    follow_champion(promote_build())


@dg.job(executor_def=dg.in_process_executor, tags={REASON: BY_HAND, **RESUMED},
        description="Mode propose: the click that rolls out what was proposed.")
def approve_rollout() -> None:
    follow_champion(approve_proposal())


@dg.job(executor_def=dg.in_process_executor, tags={MAX_RUNTIME: "600", REASON: BY_HAND, "dagster/priority": "10"},
        description="Serve again what was served before the last rollout.")
def rollback() -> None:
    follow_champion(roll_back())


@dg.op(description="Look at the lake: at the hour that is the run's partition, without one as it is now. Sensors do both by themselves.")
def look_at_lake(context: dg.OpExecutionContext, tide: TideResource) -> None:
    config = tide.settings()
    if not context.has_partition_key:
        for observation in look(config):
            context.log_event(observation)
    for event in look_at_hour(config, context.partition_key if context.has_partition_key else hour_of(time.time())):
        context.log_event(event)


@dg.job(executor_def=dg.in_process_executor, partitions_def=HOURS, tags={MAX_RUNTIME: "600", REASON: BY_HAND},
        description="Observe acceptance_log and signal_windows by hand: now, or the hours that are chosen as partitions.")
def observe_lake() -> None:
    look_at_lake()
