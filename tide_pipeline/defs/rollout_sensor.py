"""Go on with rollouts that nobody drives, and put back aliases that somebody moved. Looks, writes at most one record, gets out.

A run that rolls out drives its rollout itself; when it was killed, or the rollout was begun elsewhere, this sensor does.
"""

import functools
from typing import TYPE_CHECKING

import dagster as dg

from tide_pipeline.config import TideConfig
from tide_pipeline.defs.jobs import adapt_draft, approve_rollout, judge_challenger
from tide_pipeline.defs.resources import TideResource
from tide_pipeline.defs.tags import MAX_RUNTIME, REASON, TARGET, WORKLOAD
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.errors import BuildError, RegistryError

if TYPE_CHECKING:
    from tide_pipeline.rollout.drive import Driver

WHO = "rollout sensor"
STARTED = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.CANCELING]
DRIVERS = (adapt_draft.name, judge_challenger.name, approve_rollout.name)


@dg.sensor(name="rollout_sensor", minimum_interval_seconds=5, default_status=dg.DefaultSensorStatus.RUNNING,
           description="Advances a rollout that no run drives: bake, steps, end or the way back. One record at most at a time.")
def rollout_sensor(context: dg.SensorEvaluationContext, tide: TideResource) -> dg.SkipReason:
    from tide_pipeline.rollout.history import is_under_way

    config = tide.settings()
    latest = DeploymentRecord(config.state.deployments, config.target).latest()
    if is_under_way(latest) and (run := driving_run(context.instance, config.target)) is not None:
        return dg.SkipReason(f"run {run.run_id[:8]} drives it")
    advanced = _driver(config).advance()
    wrote = f"wrote deployment {advanced.deployment.n}: " if advanced.wrote and advanced.deployment else ""
    return dg.SkipReason(f"{wrote}{advanced.action.reason}")


@dg.sensor(name="alias_sensor", job=judge_challenger, minimum_interval_seconds=30, default_status=dg.DefaultSensorStatus.RUNNING,
           description="Keeps MLflow's champion aliases on what is served. One moved by hand is put back, and its version judged.")
def alias_sensor(tide: TideResource) -> dg.SensorResult:
    from tide_pipeline.registry.registry import open_registry
    from tide_pipeline.rollout.alias import follow_alias, waiting_request

    config = tide.settings()
    latest = DeploymentRecord(config.state.deployments, config.target).latest()
    if latest is None:
        return dg.SensorResult(skip_reason="nothing was ever deployed")
    registry = open_registry(config)
    try:
        followed, asked = follow_alias(config, registry, latest), waiting_request(registry)
    except (RegistryError, BuildError) as error:
        return dg.SensorResult(skip_reason=f"aliases were not looked at, again in 30 s: {error}")
    told = "; ".join([*(f"{alias} was moved to version {version}: put back" for alias, version in followed.requested.items()),
                      *(f"{alias} was moved and refused: {why}" for alias, why in followed.refused.items())])
    if asked is None:
        return dg.SensorResult(skip_reason=told or f"aliases stand where they should: {followed.champions}")
    reason = f"version {asked.version} was asked for in MLflow"
    return dg.SensorResult(run_requests=[dg.RunRequest(
        run_key=f"{config.target}/challenger/{asked.version}/{asked.requested_at}",
        run_config={"ops": {"draft_engine": {"config": {"version": asked.version}}}},
        tags={TARGET: config.target, WORKLOAD: asked.workload, REASON: reason, MAX_RUNTIME: "3600"})])


def driving_run(instance: dg.DagsterInstance, target: str) -> dg.DagsterRun | None:
    """A run of this target that is at work and can be in the middle of a rollout."""
    runs = (run for name in DRIVERS for run in instance.get_runs(dg.RunsFilter(job_name=name, statuses=STARTED)))
    return next((run for run in runs if run.tags.get(TARGET, target) == target), None)


@functools.lru_cache(maxsize=8)
def _driver(config: TideConfig) -> "Driver":
    """Kept between ticks, so that a shard of the log is read once."""
    from tide_pipeline.rollout.drive import Driver

    return Driver(config, WHO)
