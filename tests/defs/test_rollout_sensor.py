"""The rollout sensor watches every rollout, whatever else runs in Dagster."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from tests.fakes_rollout import write_engine
from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import ANY_WORKLOAD, Deployment, ObservedState
from tide_pipeline.definitions import defs
from tide_pipeline.defs.resources import TideResource
from tide_pipeline.defs.rollout_sensor import rollout_sensor
from tide_pipeline.defs.tags import TARGET
from tide_pipeline.deployment.record import DeploymentRecord, write_observed
from tide_pipeline.recipes import freeze
from tide_pipeline.rollout.history import ROLLED_BACK, opened


@pytest.fixture
def config(tmp_path: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> TideConfig:
    made = write_engine(tmp_path, tiny_dir)
    freeze(made, tmp_path / "settings.toml")
    monkeypatch.setenv("TIDE_CONFIG", str(tmp_path / "settings.toml"))
    return made


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        yield made


@pytest.mark.parametrize(("job", "tags"), [("adapt_draft", {TARGET: "tiny"}), ("judge_challenger", {}), ("approve_rollout", {})])
def test_a_canary_in_trouble_goes_back_while_a_run_is_busy_with_something_else(
        config: TideConfig, instance: dg.DagsterInstance, job: str, tags: dict[str, str]) -> None:
    """Whoever opened it has gone (a closed terminal); the run that is at work trains, and looks at no rollout."""
    record = DeploymentRecord(config.state.deployments, config.target)
    record.append(Deployment(1, config.target, {"rest": {ANY_WORKLOAD: "old"}}, (), "stable", "tide", "shipped"))
    record.append(opened(record.latest(), config.target, ANY_WORKLOAD, "new", ["replica-0"], "somebody", "by hand"))
    write_observed(config.state.observed, ObservedState("replica-0", config.target, 1, {ANY_WORKLOAD: "old"}, {}, 2.0, 9.0, "NaN in it",
                                                        time.time() + 9.0, 1))
    instance.create_run_for_job(defs().resolve_job_def(job), status=dg.DagsterRunStatus.STARTED, tags=tags)
    rollout_sensor(dg.build_sensor_context(instance=instance), tide=TideResource())
    latest = record.latest()
    assert latest is not None and (latest.stage, latest.who) == (ROLLED_BACK, "rollout sensor") and "NaN in it" in latest.reason
