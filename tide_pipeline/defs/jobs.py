"""What can be launched: one adaptation, a challenger's trial, approval, the way back, a look at the lake.

Steps share a process; training has its own.
"""

import dagster as dg

from tide_pipeline.defs.lake import look
from tide_pipeline.defs.resources import TideResource
from tide_pipeline.deployment.record import DeploymentRecord

TARGET, WORKLOAD, REASON, EPISODE, ATTEMPT = "tide/target", "tide/workload", "tide/reason", "tide/episode", "tide/attempt"
DRIFTED_AT = "tide/drifted_at"             # Unix seconds of the verdict
MAX_RUNTIME = "dagster/max_runtime"        # seconds; run monitoring fails a run that is still going then
ONE_AT_A_TIME = "tide/adapts"              # dagster.yaml lets one run with this tag go and queues the others
# A run whose worker was killed is run again from the step that was cut off (dagster.yaml: not one whose step failed).
RESUMED = {"dagster/max_retries": "2", "dagster/retry_strategy": "FROM_FAILURE"}

adapt_draft = dg.define_asset_job(
    "adapt_draft", dg.AssetSelection.assets("draft_checkpoint", "registered_draft", "draft_engine", "benchmark_report", "live_draft"),
    executor_def=dg.in_process_executor, tags={MAX_RUNTIME: "7200", REASON: "launched by hand", ONE_AT_A_TIME: "draft", **RESUMED},
    description="Train a draft on what was captured, register and build it, prove it against the champion, roll it out.")


judge_challenger = dg.define_asset_job(
    "judge_challenger", dg.AssetSelection.assets("draft_engine", "benchmark_report", "live_draft"),
    executor_def=dg.in_process_executor, tags={MAX_RUNTIME: "3600", REASON: "launched by hand", ONE_AT_A_TIME: "draft", **RESUMED},
    description="Put a registered version before the gate and, if it passes, do with it what rollout.mode says: for an alias that was "
                "moved by hand, or with draft_engine's `version` filled in.")


class ApprovalConfig(dg.Config):
    """Why what was proposed is rolled out."""

    reason: str = "approved"


@dg.op(description="Roll out what the deployment record proposes; asks the gate's verdict again.")
def approve_proposal(context: dg.OpExecutionContext, config: ApprovalConfig, tide: TideResource) -> int:
    from tide_pipeline.rollout.by_hand import approve

    done = approve(tide.settings(), who=f"dagster run {context.run.run_id[:8]}", reason=config.reason, progress=context.log.info)
    if done.stage != "stable":
        raise dg.Failure(f"deployment {done.n} is {done.stage}: {done.reason}", allow_retries=False)
    return done.n


class RollbackConfig(dg.Config):
    """Why the last rollout is undone."""

    reason: str = "launched by hand"


@dg.op(description="Put back what was served before the last rollout.")
def roll_back(context: dg.OpExecutionContext, config: RollbackConfig, tide: TideResource) -> int:
    from tide_pipeline.rollout import rollback

    deployment = rollback(tide.settings(), who=f"dagster run {context.run.run_id[:8]}", reason=config.reason)
    context.log.info(f"deployment {deployment.n} serves {deployment.groups['rest']}")
    return deployment.n


@dg.op(description="Let MLflow's champion alias follow what is served. A step of its own: serving does not wait for MLflow.")
def follow_champion(context: dg.OpExecutionContext, deployment: int, tide: TideResource) -> None:
    from tide_pipeline.registry.registry import open_registry
    from tide_pipeline.rollout.alias import follow_alias

    config = tide.settings()
    latest = DeploymentRecord(config.state.deployments, config.target).latest()
    if latest is not None:
        context.log.info(f"after deployment {deployment}: {follow_alias(config, open_registry(config), latest)}")


@dg.job(executor_def=dg.in_process_executor, tags={MAX_RUNTIME: "7200", REASON: "approved by hand", ONE_AT_A_TIME: "draft", **RESUMED},
        description="Mode propose: the click that rolls out what was proposed.")
def approve_rollout() -> None:
    follow_champion(approve_proposal())


@dg.job(executor_def=dg.in_process_executor, tags={MAX_RUNTIME: "600", REASON: "launched by hand"},
        description="Serve again what was served before the last rollout.")
def rollback() -> None:
    follow_champion(roll_back())


@dg.op(description="Look at the lake now; the drift sensor does it every few seconds.")
def look_at_lake(context: dg.OpExecutionContext, tide: TideResource) -> None:
    for observation in look(tide.settings()):
        context.log_event(observation)


@dg.job(executor_def=dg.in_process_executor, description="Observe acceptance_log and signal_windows by hand.")
def observe_lake() -> None:
    look_at_lake()
