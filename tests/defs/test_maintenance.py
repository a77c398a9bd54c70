"""The lake and the builds are looked after by schedules: what they launch does what it says, on a real lake."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import dagster as dg
import pytest

from tests.fakes_training import engine_with_lake
from tide_pipeline.capture.layout import live_shards
from tide_pipeline.config import TideConfig, override
from tide_pipeline.contracts import Deployment, EngineBuild
from tide_pipeline.definitions import defs
from tide_pipeline.deployment.builds import build_dir, list_builds, save_build
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.recipes import freeze
from tide_pipeline.rollout.tidy import YOUNG_S, tidy_builds


@pytest.fixture
def config(tmp_path: Path) -> TideConfig:
    return engine_with_lake(tmp_path, {}, de=2, py=2)


def run(name: str, config: TideConfig, monkeypatch: pytest.MonkeyPatch) -> dg.ExecuteInProcessResult:
    file = config.state.root / "settings.toml"
    freeze(config, file)
    monkeypatch.setenv("TIDE_CONFIG", str(file))
    return defs().resolve_job_def(name).execute_in_process(raise_on_error=False)


def told(result: dg.ExecuteInProcessResult, op: str) -> dict[str, object]:
    (event,) = [e for e in result.events_for_node(op) if e.is_successful_output]
    return {name: value.value for name, value in event.step_output_data.metadata.items()}


def test_small_shards_become_one(config: TideConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.fakes_training import captured, open_target, to_lake

    target = open_target(config)
    for seed in range(2, 10):
        to_lake(config, captured(target, "de", 1, seed=seed))
    long_ago = time.time() - 3_600
    for shard in live_shards(config.state.signals, config.target):
        os.utime(shard, (long_ago, long_ago))
    before = len(live_shards(config.state.signals, config.target))
    result = run("compact_lake", config, monkeypatch)
    assert result.success
    assert told(result, "compact_lake_op")["compacted_shards"] == before == 9
    assert len(live_shards(config.state.signals, config.target)) == 1


def test_retention_follows_the_settings(config: TideConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("retain_lake", config, monkeypatch).success
    assert len(live_shards(config.state.signals, config.target)) == 1                       # nothing is set: nothing goes
    assert run("retain_lake", override(config, {"retention": {"signal_gb": 1e-9}}), monkeypatch).success
    assert live_shards(config.state.signals, config.target) == []
    wrong = run("retain_lake", override(config, {"retention": {"tenant_days": ["acme"]}}), monkeypatch)
    assert not wrong.success and "NAME=DAYS" in str(wrong.failure_data_for_node("retain_lake_op"))


def test_a_flipped_bit_fails_the_check(config: TideConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("verify_lake", config, monkeypatch).success
    (shard,) = live_shards(config.state.signals, config.target)
    data = bytearray(Path(shard).read_bytes())
    data[len(data) // 2] ^= 1
    Path(shard).write_bytes(data)
    wrong = run("verify_lake", config, monkeypatch)
    assert not wrong.success and "altered" in str(wrong.failure_data_for_node("verify_lake_op"))


def test_builds_that_may_be_wanted_stay(config: TideConfig) -> None:
    now, target = time.time(), config.target
    served, before, old, young = "a1", "b2", "c3", "d4"
    for build_id in (served, before, old, young):
        folder = build_dir(config.state.builds, target, build_id)
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(b"x")
        made = EngineBuild(build_id, target, "embedded", str(folder), "v", "d", "e", now - (0 if build_id == young else 2 * YOUNG_S))
        save_build(made)
    record = DeploymentRecord(config.state.deployments, target)
    first = Deployment(1, target, {"rest": {"*": before}}, (), "stable", "me", "first")
    record.append(first)
    record.append(dataclasses.replace(first, n=2, groups={"rest": {"*": served}}))
    assert tidy_builds(config, now) == [old]
    assert {build.build_id for build in list_builds(config.state.builds, target)} == {served, before, young}
    assert not build_dir(config.state.builds, target, old).exists() and tidy_builds(config, now) == []


def test_schedules_say_why_they_run() -> None:
    for schedule in defs().get_repository_def().schedule_defs:
        assert schedule.default_status is dg.DefaultScheduleStatus.RUNNING and "schedule" in schedule.tags["tide/reason"]
