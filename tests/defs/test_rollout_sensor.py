"""The rollout sensor watches every rollout, whatever else runs in Dagster, and tells what is served where no run did."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest

from tests.fakes_rollout import write_engine
from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import ANY_WORKLOAD, Deployment, ObservedState
from tide_pipeline.definitions import defs
from tide_pipeline.defs.keys import PREFIX, key_of
from tide_pipeline.defs.resources import TideResource
from tide_pipeline.defs.rollout_sensor import rollout_sensor
from tide_pipeline.defs.tags import TARGET
from tide_pipeline.deployment.record import DeploymentRecord, write_observed
from tide_pipeline.recipes import freeze
from tide_pipeline.rollout.history import (
    PINNED,
    ROLLED_BACK,
    STABLE,
    following,
    held,
    opened,
    restored,
    settled,
    withdrawn,
)


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


# --- what is served, as an event -----------------------------------------------------------------------------------

class Stack:
    """The record of a target, and a Dagster that stores what the sensor says, as its daemon does."""

    def __init__(self, config: TideConfig, instance: dg.DagsterInstance) -> None:
        self.instance, self.record = instance, DeploymentRecord(config.state.deployments, config.target)
        self.append(lambda _: following(None, config.target, {"rest": {ANY_WORKLOAD: "b0"}}, (), STABLE, "tide", "shipped"))

    def append(self, make: Callable[[Deployment], Deployment], age_s: float = 60.0) -> Deployment:
        made = make(self.record.latest())      # type: ignore[arg-type]
        return self.record.append(dataclasses.replace(made, created_at=time.time() - age_s))

    def roll_out(self, build_id: str, workload: str = ANY_WORKLOAD, age_s: float = 60.0) -> Deployment:
        self.append(lambda last: opened(last, last.target, workload, build_id, ["replica-0"], "ada", "by hand"))
        return self.append(lambda last: settled(last, "rollout sensor", "by hand: fine"), age_s)

    def tick(self) -> list[dict[str, object]]:
        """What was told, as the asset's metadata."""
        done = rollout_sensor(dg.build_sensor_context(instance=self.instance), tide=TideResource())
        assert isinstance(done, dg.SensorResult) and done.skip_reason is not None
        for event in done.asset_events:
            assert isinstance(event, dg.AssetMaterialization) and event.asset_key == key_of("live_draft")
            self.instance.report_runless_asset_event(event)
        return [{name: told.value for name, told in event.metadata.items()} for event in done.asset_events]


@pytest.fixture
def stack(config: TideConfig, instance: dg.DagsterInstance) -> Stack:
    return Stack(config, instance)


def test_a_draft_that_went_live_without_a_run_is_told_once(config: TideConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On disk, as it is in production; under the name that the asset has where Dagster shows several targets."""
    (tmp_path / "dagster").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "dagster")) as instance:
        stack = Stack(config, instance)
        assert stack.tick() == [], "what the engine ships came by no rollout"
        done = stack.roll_out("b1", "de")
        told = {"deployment": done.n, "serves": "de", "build_id": "b1", "draft_version": "", "reason": "by hand: fine"}
        for prefix in ("", "qwen3-8b"):
            monkeypatch.setenv(PREFIX, prefix)
            assert [stack.tick(), stack.tick()] == [[told], []]


def test_the_way_back_is_told(stack: Stack) -> None:
    stack.roll_out("b1")
    assert len(stack.tick()) == 1
    back = stack.append(lambda last: restored(last, last.target, {ANY_WORKLOAD: "b0"}, "ada", "slower at night"))
    (told,) = stack.tick()
    assert (told["deployment"], told["serves"], told["build_id"], told["reason"]) == (back.n, ANY_WORKLOAD, "b0", "slower at night")
    assert stack.tick() == []


def test_a_run_that_lives_tells_it_itself(stack: Stack) -> None:
    """With the seconds of its stages; it has half a minute for that."""
    done = stack.roll_out("b1", age_s=10.0)
    assert stack.tick() == []
    by_its_run = dg.AssetMaterialization(key_of("live_draft"), metadata={"deployment": done.n, "train_s": 75.0})
    stack.instance.report_runless_asset_event(by_its_run)
    stack.append(lambda last: held(last, PINNED, "ada", "a demo"))
    assert stack.tick() == []


def test_what_changes_nothing_that_is_served_is_no_new_draft(stack: Stack) -> None:
    """Freshness says how old the draft is: refused ones and pins make it no younger."""
    stack.roll_out("b1")
    assert len(stack.tick()) == 1
    stack.append(lambda last: opened(last, last.target, ANY_WORKLOAD, "b2", [], "a run", "proposed"))
    assert stack.tick() == []
    stack.append(lambda last: opened(last, last.target, ANY_WORKLOAD, "b2", ["replica-0"], "ada", "approved"))
    stack.append(lambda last: withdrawn(last, "rollout sensor", "drop +0.4"))
    stack.append(lambda last: held(last, PINNED, "ada", "a demo"))
    assert stack.tick() == []


def test_a_change_that_a_proposal_hides_is_told_all_the_same(stack: Stack) -> None:
    done = stack.roll_out("b1")
    stack.append(lambda last: opened(last, last.target, ANY_WORKLOAD, "b2", [], "a run", "proposed"))
    (told,) = stack.tick()
    assert told["deployment"] == done.n and stack.tick() == []
