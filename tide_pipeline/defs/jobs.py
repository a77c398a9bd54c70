"""What can be launched: one adaptation, or the way back. Steps share one process; training is a process of its own inside it."""

import dagster as dg

from tide_pipeline.defs.resources import TideResource

TARGET, WORKLOAD, REASON, EPISODE, ATTEMPT = "tide/target", "tide/workload", "tide/reason", "tide/episode", "tide/attempt"
MAX_RUNTIME = "dagster/max_runtime"        # seconds; run monitoring fails a run that is still going then

adapt_draft = dg.define_asset_job(
    "adapt_draft", dg.AssetSelection.assets("draft_checkpoint", "registered_draft", "draft_engine", "benchmark_report", "live_draft"),
    executor_def=dg.in_process_executor, tags={MAX_RUNTIME: "7200", REASON: "launched by hand"},
    description="Train a draft on what was captured, register and build it, prove it against the champion, roll it out.")


class RollbackConfig(dg.Config):
    """Why the last rollout is undone."""

    reason: str = "launched by hand"


@dg.op(description="Put back what was served before the last rollout.")
def roll_back(context: dg.OpExecutionContext, config: RollbackConfig, tide: TideResource) -> None:
    from tide_pipeline.rollout import rollback

    deployment = rollback(tide.settings(), who=f"dagster run {context.run_id[:8]}", reason=config.reason)
    context.log.info(f"deployment {deployment.n}: {deployment.groups}")


@dg.job(executor_def=dg.in_process_executor, tags={MAX_RUNTIME: "600", REASON: "launched by hand"},
        description="Serve the drafts of the deployment before the last one again.")
def rollback() -> None:
    roll_back()
