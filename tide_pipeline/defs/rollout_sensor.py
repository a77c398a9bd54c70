"""Watch every rollout, tell Dagster what is served, and put back aliases that somebody moved. Looks, writes at most one record, gets out.

A run or a terminal that began a rollout drives it too, until it is killed or closed. Two drivers are as good as one (rollout/drive.py), and
no list of runs tells whether one of them still watches: one that trains does not.
"""

import functools
from typing import TYPE_CHECKING

import dagster as dg

from tide_pipeline.config import TideConfig
from tide_pipeline.defs.jobs import judge_challenger
from tide_pipeline.defs.limits import challenger_tags
from tide_pipeline.defs.resources import TideResource
from tide_pipeline.defs.served import untold
from tide_pipeline.defs.tags import REASON, TARGET, WORKLOAD
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.errors import BuildError, RegistryError

if TYPE_CHECKING:
    from tide_pipeline.rollout.drive import Driver

WHO = "rollout sensor"


@dg.sensor(name="rollout_sensor", minimum_interval_seconds=5, default_status=dg.DefaultSensorStatus.RUNNING,
           description="Advances any rollout: bake, steps, end or the way back. One record at most at a time. "
                       "What is served is told as live_draft, where no run of it did.")
def rollout_sensor(context: dg.SensorEvaluationContext, tide: TideResource) -> dg.SensorResult:
    config = tide.settings()
    advanced = _driver(config).advance()
    wrote = f"wrote deployment {advanced.deployment.n}: " if advanced.wrote and advanced.deployment else ""
    return dg.SensorResult(skip_reason=f"{wrote}{advanced.action.reason}",
                           asset_events=untold(context.instance, config, advanced.deployment))


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
        tags={TARGET: config.target, WORKLOAD: asked.workload, REASON: reason, **challenger_tags(config)})])


@functools.lru_cache(maxsize=8)
def _driver(config: TideConfig) -> "Driver":
    """Kept between ticks, so that a shard of the log is read once."""
    from tide_pipeline.rollout.drive import Driver

    return Driver(config, WHO)
