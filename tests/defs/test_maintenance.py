"""The lake and the builds are looked after by schedules: what they launch does what it says, on a real lake."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from tests.fakes_training import engine_with_lake
from tide_pipeline.capture.layout import live_shards
from tide_pipeline.config import TideConfig, override
from tide_pipeline.contracts import Deployment, EngineBuild
from tide_pipeline.definitions import defs
from tide_pipeline.defs.maintenance import in_use
from tide_pipeline.deployment.builds import build_dir, list_builds, save_build
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.recipes import freeze
from tide_pipeline.rollout.history import opened, settled, withdrawn
from tide_pipeline.rollout.tidy import YOUNG_S, tidy_builds, wanted_builds


@pytest.fixture
def config(tmp_path: Path) -> TideConfig:
    return engine_with_lake(tmp_path, {}, de=2, py=2)


def run(name: str, config: TideConfig, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dg.ExecuteInProcessResult:
    file = config.state.root / "settings.toml"
    freeze(config, file)
    monkeypatch.setenv("TIDE_CONFIG", str(file))
    return defs().resolve_job_def(name).execute_in_process(raise_on_error=False, **options)


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


def test_refused_rollouts_do_not_take_the_way_back(config: TideConfig) -> None:
    """What was served first and what a rollback restores stay, however many drafts came and went meanwhile."""
    record = DeploymentRecord(config.state.deployments, config.target)
    latest = record.append(Deployment(1, config.target, {"rest": {"*": "first"}}, (), "stable", "me", ""))
    for build in ("b1", "b2"):
        latest = record.append(settled(record.append(opened(latest, config.target, "*", build, ["a"], "me", "")), "me", ""))
    for refused in range(30):
        latest = record.append(withdrawn(record.append(opened(latest, config.target, "*", f"r{refused}", ["a"], "me", "")), "me", "slower"))
    wanted = wanted_builds(config, time.time())
    assert {"first", "b1", "b2", "r29"} <= wanted and "r0" not in wanted


@pytest.mark.filterwarnings("ignore::Warning:mlflow.*", "ignore::Warning:alembic.*", "ignore::ResourceWarning")
def test_weights_of_old_adaptations_go_and_runs_of_today_keep_theirs(config: TideConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIDE_MLFLOW_URI", raising=False)
    weights = {name: config.state.training / name / "draft" / "model.safetensors" for name in ("long-ago", "today", "newest")}
    for age, file in enumerate(reversed(weights.values())):
        file.parent.mkdir(parents=True)
        file.write_bytes(b"12345")
        request = file.parent.parent / "request.json"
        request.write_text("{}")
        os.utime(request, (time.time() - 1_000 * age,) * 2)
    keep = override(config, {"retention": {"training_keep": 1}})
    with dg.DagsterInstance.ephemeral() as instance:
        asked = {"ops": {"draft_engine": {"config": {"version": 4}}}}
        instance.add_run(dg.DagsterRun("judge_challenger", "second-attempt", asked, root_run_id="today", parent_run_id="today",
                                       status=dg.DagsterRunStatus.STARTED))
        assert (found := in_use(instance)).versions == {4} and found.runs == {"second-attempt", "today"}
        looked = run("tidy_drafts", keep, monkeypatch, instance=instance,
                     run_config={"ops": {"tidy_drafts_op": {"config": {"only_look": True}}}})
        assert looked.success and told(looked, "tidy_drafts_op")["adaptations"] == ["long-ago"] and weights["long-ago"].exists()
        done = run("tidy_drafts", keep, monkeypatch, instance=instance)
        assert done.success and told(done, "tidy_drafts_op")["freed_bytes"] == 5
    assert {name for name, file in weights.items() if file.exists()} == {"today", "newest"}
    wrong = run("tidy_drafts", override(config, {"retention": {"drafts_keep": -1}}), monkeypatch)
    assert not wrong.success and "or 0 for all" in str(wrong.failure_data_for_node("tidy_drafts_op"))


def test_schedules_say_why_they_run() -> None:
    for schedule in defs().get_repository_def().schedule_defs:
        assert schedule.default_status is dg.DefaultScheduleStatus.RUNNING and "schedule" in schedule.tags["tide/reason"]
