"""The job adapt_draft in one process on a tiny target: real training, MLflow on SQLite, build, gate, rollout to a fake replica."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest

from tests.fakes_rollout import FakeReplica, write_engine
from tests.helpers import ask, generate, tiny_engine, write_tiny_build
from tide_pipeline import recipes
from tide_pipeline.capture.recorder import Recorder
from tide_pipeline.config import CaptureSettings, TideConfig, override
from tide_pipeline.contracts import EngineBuild
from tide_pipeline.definitions import defs
from tide_pipeline.defs.draft import name_challenger
from tide_pipeline.defs.limits import challenger_tags
from tide_pipeline.defs.resources import TideResource
from tide_pipeline.defs.rollout_sensor import alias_sensor, rollout_sensor
from tide_pipeline.deployment.builds import list_builds, load_build
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.engine_spec import load_engine_spec
from tide_pipeline.models.target import Target
from tide_pipeline.registry.registry import Registry, open_registry
from tide_pipeline.registry.shipped import shipped_checkpoint
from tide_pipeline.rollout.history import is_under_way, opened
from tide_pipeline.rollout.initial import ensure_initial

pytestmark = [pytest.mark.filterwarnings("ignore::Warning:mlflow.*"), pytest.mark.filterwarnings("ignore::Warning:alembic.*"),
              pytest.mark.filterwarnings("ignore::ResourceWarning"),
              pytest.mark.filterwarnings("ignore:Function `PipesMessageReader.expected_writer_count`")]     # Dagster warns about itself

SHORT = {"training": {"time_budget_s": 0.0, "max_steps": 24, "eval_every_steps": 12, "learning_rate": 0.01, "min_prompts": 4,
                      "eval_share": 0.25, "nice": 0},
         "gate": {"min_gain": -9.0, "max_workload_loss": 9.0, "min_speedup_ratio": 0.0, "min_prompts": 2, "bootstrap": 50,
                  "bench_prompts": 2, "bench_tokens": 16, "equivalence_prompts": 2},
         "rollout": {"min_bake_steps": 30, "max_drop": 0.9}}
ORDER = ["draft_checkpoint", "registered_draft", "draft_engine", "benchmark_report", "live_draft"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path, tiny_target: Target) -> TideConfig:
    """A tiny engine whose shipped draft serves, and captured traffic of one workload."""
    root = tmp_path_factory.mktemp("adaptation")
    shipped = write_tiny_build(root / "shipped", tiny_target, noise=0.5)
    made = override(write_engine(root, tiny_dir, champion=Path(shipped.path) / "draft"), SHORT)
    recipes.freeze(made, root / "settings.toml")
    deployment = ensure_initial(made)
    assert deployment is not None
    _traffic(made, load_build(made.state.builds, made.target, deployment.groups["rest"]["*"]))
    return made


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.local_temp(str(tmp_path_factory.mktemp("dagster"))) as made:
        yield made


@pytest.fixture(autouse=True)
def environment(config: TideConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDE_CONFIG", str(Path(config.engines_dir).parent / "settings.toml"))
    monkeypatch.delenv("TIDE_MLFLOW_URI", raising=False)


def job() -> dg.JobDefinition:
    return defs().resolve_job_def("adapt_draft")


def rollback_job() -> dg.JobDefinition:
    return defs().resolve_job_def("rollback")


def test_training_is_not_lost_to_a_registry_that_is_away_and_the_loop_closes(
        config: TideConfig, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tide_pipeline.defs.draft.AWAY_TRIES", 0)      # the ten minutes that a step waits are over
    monkeypatch.setenv("TIDE_MLFLOW_URI", "http://127.0.0.1:9")
    asked = {"ops": {"draft_checkpoint": {"config": {"workload": "code", "reason": "acceptance fell", "drifted_at": time.time() - 30,
                                                         "since": "2026-01-01"}}}}
    with dg.execute_job(dg.reconstructable(job), instance, run_config=asked) as failed:
        assert not failed.success and [event.asset_key.to_user_string() for event in failed.get_asset_materialization_events()] == ORDER[:1]
    monkeypatch.delenv("TIDE_MLFLOW_URI")

    options = dg.ReexecutionOptions.from_failure(failed.run_id, instance)
    with (FakeReplica(config, "replica-0", workload="code"),
          dg.execute_job(dg.reconstructable(job), instance, reexecution_options=options) as done):
        assert done.success
    assert [event.asset_key.to_user_string() for event in done.get_asset_materialization_events()] == ORDER[1:]
    (checked,) = done.get_asset_check_evaluations()
    assert checked.passed and checked.check_name == "challenger_beats_champion"

    latest = DeploymentRecord(config.state.deployments, config.target).latest()
    draft = open_registry(config).list()[-1]
    assert latest is not None and (latest.n, latest.stage) == (3, "stable") and "acceptance fell" in latest.reason
    assert load_build(config.state.builds, config.target, latest.groups["rest"]["*"]).draft_version == draft.draft_version
    assert open_registry(config).alias("champion") == draft.version and "challenger" not in open_registry(config).aliases()
    assert float(draft.tags["challenged_at"]) > draft.created_at - 60, "it was the challenger on its way"
    assert draft.tags["workload"] == "code" and draft.tags["dagster_run_id"] == failed.run_id
    run = instance.get_run_by_id(failed.run_id)
    assert run is not None and run.tags.items() >= {"tide/target": config.target, "tide/workload": "code", "tide/reason": "acceptance fell",
                                                    "tide/since": "2026-01-01T00:00:00Z"}.items()
    assert "dagster/max_runtime" not in run.tags, "by steps there is no budget of time"
    assert draft.tags["captured_since"] == "2026-01-01T00:00:00Z" and "captured_until" not in draft.tags
    birth = json.loads((config.state.training / failed.run_id / "draft" / "provenance.json").read_text())
    assert birth["captured_since"] == "2026-01-01T00:00:00Z" and "captured_until" not in birth
    numbers = {event.asset_key.to_user_string(): event.materialization.metadata for event in done.get_asset_materialization_events()}
    assert numbers["benchmark_report"]["acceptance_length"].value >= 1.0 and numbers["benchmark_report"]["mismatches"].value == 0
    stages = json.loads((config.state.training / failed.run_id / "stages.json").read_text())
    assert list(stages) == ["collect", "start", "train", "register", "build", "gate", "bake", "roll out"]
    assert 30 <= stages["collect"] < 60 and stages["train"] > 0 and stages["bake"] > 0
    assert numbers["live_draft"]["train_s"].value == stages["train"] and numbers["live_draft"]["roll_out_s"].value == stages["roll out"]


def test_a_refused_draft_is_not_rolled_out(config: TideConfig, instance: dg.DagsterInstance) -> None:
    """The steps after the build once more, with a gate that nothing passes."""
    strict = override(config, {"gate": {"min_gain": 9.0}})
    recipes.freeze(strict, Path(config.engines_dir).parent / "settings.toml")
    before, registry = DeploymentRecord(config.state.deployments, config.target).latest(), open_registry(config)
    registry.set_alias("challenger", registry.list()[-1].version)
    root = min(instance.get_run_records(), key=lambda record: record.create_timestamp).dagster_run.run_id
    gate = [dg.AssetKey("benchmark_report"), dg.AssetKey("live_draft")]
    refused = job().execute_in_process(asset_selection=gate, run_id=root, raise_on_error=False)
    assert not refused.success
    (checked,) = refused.get_asset_check_evaluations()
    assert not checked.passed and "the gain is below 9.00" in (checked.description or "")
    assert [event.asset_key.to_user_string() for event in refused.get_asset_materialization_events()] == ["benchmark_report"]
    assert DeploymentRecord(config.state.deployments, config.target).latest() == before and registry.alias("challenger") is None


def test_the_way_back(config: TideConfig) -> None:
    record = DeploymentRecord(config.state.deployments, config.target)
    shipped = record.history()[0].groups["rest"]
    assert rollback_job().execute_in_process(run_config={"ops": {"roll_back": {"config": {"reason": "a drill"}}}}).success
    latest = record.latest()
    assert latest is not None and latest.groups["rest"] == shipped and latest.reason == "a drill"


def test_observe_deploys_nothing_and_propose_waits_for_a_click(config: TideConfig, instance: dg.DagsterInstance) -> None:
    record = DeploymentRecord(config.state.deployments, config.target)
    before, build = record.latest(), open_registry(config).list()[-1].draft_version
    assert before is not None
    for mode, stage in (("observe", before.stage), ("propose", "proposed")):
        done, passed = rolled_out(override(config, {"rollout": {"mode": mode}}), instance)
        latest = record.latest()
        made = [event.asset_key.to_user_string() for event in done.get_asset_materialization_events()]
        assert done.success and made == ["benchmark_report"]
        assert load_build(config.state.builds, config.target, passed).draft_version == build, "the drift sensor reads it there"
        assert latest is not None and latest.stage == stage and latest.groups["rest"] == before.groups["rest"]
    assert load_build(config.state.builds, config.target, latest.groups["canary"]["*"]).draft_version == build
    with FakeReplica(config, "replica-0", workload="code"):
        assert defs().resolve_job_def("approve_rollout").execute_in_process(instance=instance).success
    approved = record.latest()
    assert approved is not None and approved.groups["rest"] == latest.groups["canary"] and approved.stage == "stable"


def test_an_alias_moved_by_hand_goes_through_the_gate(config: TideConfig, instance: dg.DagsterInstance) -> None:
    """The shipped draft is asked for by moving `champion` to it; the sensor puts it back, the job judges and serves it."""
    recipes.freeze(config, Path(config.engines_dir).parent / "settings.toml")
    registry, checkpoint = open_registry(config), shipped_checkpoint(config)
    assert checkpoint is not None
    shipped, champion = registry.register(checkpoint, lineage={"workload": "code"}, label="shipped"), registry.alias("champion")
    registry.set_alias("champion", shipped.version)
    asked = looked(instance).run_requests
    assert asked is not None and registry.alias("champion") == champion and registry.alias("challenger") == shipped.version
    again = looked(instance).run_requests
    assert again is not None and asked[0].run_key == again[0].run_key, "Dagster takes a key once"
    assert asked[0].tags.items() >= challenger_tags(config).items()
    with FakeReplica(config, "replica-0", workload="code"):
        done = defs().resolve_job_def("judge_challenger").execute_in_process(instance=instance, run_config=asked[0].run_config)
    assert done.success and registry.get(shipped.version).tags["request"] == "passed by the gate"
    latest = DeploymentRecord(config.state.deployments, config.target).latest()
    assert latest is not None and "was asked for in MLflow" in latest.reason and registry.alias("champion") == shipped.version
    assert not looked(instance).run_requests


def test_a_request_that_can_not_be_judged_is_answered(config: TideConfig, instance: dg.DagsterInstance) -> None:
    """Nothing of the workload was captured: nobody tries again, so whoever moved the alias must hear why."""
    registry = open_registry(config)
    version = registry.list()[0].version
    registry.tag(version, {"request": "waiting", "requested_at": "1.0", "requested_for": "never asked"})
    done = defs().resolve_job_def("judge_challenger").execute_in_process(
        instance=instance, run_config={"ops": {"draft_engine": {"config": {"version": version}}}}, raise_on_error=False)
    answer, run = registry.get(version).tags["request"], instance.get_run_by_id(done.run_id)
    assert run is not None and run.tags.items() >= {
        "tide/target": config.target, "tide/workload": "never asked", "tide/reason": f"version {version} was asked for in MLflow",
        **challenger_tags(config)}.items()
    assert not done.success and answer.startswith("failed: ") and "'never asked'" in answer


def test_a_request_for_which_the_lake_stayed_away_is_answered(
        config: TideConfig, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last try, and not before."""
    registry, run_id = open_registry(config), str(uuid.uuid4())
    version = registry.list()[0].version
    registry.tag(version, {"request": "waiting", "requested_at": "1.0", "requested_for": "code"})
    for name, value in (("AWAY_TRIES", 1), ("AWAY_S", 0.5)):
        monkeypatch.setattr(f"tide_pipeline.defs.draft.{name}", value)
    with no_lake(config, lambda: False):
        done = defs().resolve_job_def("judge_challenger").execute_in_process(
            instance=instance, run_id=run_id, run_config={"ops": {"draft_engine": {"config": {"version": version}}}}, raise_on_error=False)
    assert not done.success and retried(instance, run_id) == {"benchmark_report"}
    assert registry.get(version).tags["request"].startswith("failed: can't list ")


def test_a_registry_that_is_away_costs_the_alias_and_no_draft(config: TideConfig) -> None:
    draft, context = open_registry(config).list()[-1], dg.build_asset_context()
    name_challenger(context, Registry("http://127.0.0.1:9", config.target), draft)
    name_challenger(context, open_registry(config), draft)
    assert open_registry(config).alias("challenger") == draft.version


def test_a_rollout_whose_run_was_killed_is_gone_on_with(config: TideConfig, instance: dg.DagsterInstance) -> None:
    record, build = DeploymentRecord(config.state.deployments, config.target), open_registry(config).list()[0]
    made = next(b for b in list_builds(config.state.builds, config.target) if b.draft_version == build.draft_version)
    with FakeReplica(config, "replica-0", workload="code"):
        record.append(opened(record.latest(), config.target, "*", made.build_id, ["replica-0"], "a run that died", "drift"))
        gives_up = time.monotonic() + 60
        while is_under_way(record.latest()):
            assert time.monotonic() < gives_up
            rollout_sensor(dg.build_sensor_context(instance=instance), tide=TideResource())
            time.sleep(0.1)
    latest = record.latest()
    assert latest is not None and (latest.who, latest.stage) == ("rollout sensor", "stable")


def test_a_lake_that_can_not_be_listed_is_waited_for(config: TideConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the trainer, a process of its own, and by the gate. What was trained is judged, and nothing fails."""
    recipes.freeze(config, Path(config.engines_dir).parent / "settings.toml")
    for module in ("draft", "trainer"):
        monkeypatch.setattr(f"tide_pipeline.defs.{module}.AWAY_S", 1.5)
    asked = {"ops": {"draft_checkpoint": {"config": {"workload": "code"}}}}
    steps, run_id = [dg.AssetKey("draft_checkpoint"), dg.AssetKey("benchmark_report")], str(uuid.uuid4())
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance, no_lake(config, lambda: bool(retried(instance, run_id))):
        trained = job().execute_in_process(asset_selection=steps[:1], run_id=run_id, run_config=asked, instance=instance)
        run = instance.get_run_by_id(run_id)
        assert trained.success and retried(instance, run_id) == {"draft_checkpoint"}
        assert run is not None and run.tags["tide/worker"] == f"{socket.gethostname()}/{os.getpid()}", "the janitor looks there"
    others = [dg.AssetKey("registered_draft"), dg.AssetKey("draft_engine")]
    assert job().execute_in_process(asset_selection=others, run_id=run_id).success
    (tmp_path / "last").mkdir()                                # a run id is taken once
    with dg.DagsterInstance.local_temp(str(tmp_path / "last")) as instance, no_lake(config, lambda: bool(retried(instance, run_id))):
        judged = job().execute_in_process(asset_selection=steps[1:], run_id=run_id, instance=instance)
        assert judged.success and retried(instance, run_id) == {"benchmark_report"}


@contextlib.contextmanager
def no_lake(config: TideConfig, is_enough: Callable[[], bool]) -> Iterator[None]:
    """The signals are elsewhere and a file lies in their place, until the block ends or it is enough."""
    signals, aside, ended = config.state.lake / "signals", config.state.lake / "aside", threading.Event()
    assert isinstance(signals, Path)
    signals.rename(aside)
    signals.write_text("not a folder")

    def put_back() -> None:
        while not ended.wait(0.2) and not is_enough():
            pass
        signals.unlink()
        aside.rename(signals)

    thread = threading.Thread(target=put_back)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def retried(instance: dg.DagsterInstance, run_id: str) -> set[str | None]:
    return {event.step_key for event in instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_UP_FOR_RETRY)}


def rolled_out(config: TideConfig, instance: dg.DagsterInstance) -> tuple[dg.ExecuteInProcessResult, str]:
    """Gate and rollout of the first adaptation once more, with these settings; and the build that its run is tagged with."""
    recipes.freeze(config, Path(config.engines_dir).parent / "settings.toml")
    root = min(instance.get_run_records(), key=lambda record: record.create_timestamp).dagster_run.run_id
    steps = [dg.AssetKey("benchmark_report"), dg.AssetKey("live_draft")]
    with dg.DagsterInstance.ephemeral() as other:              # a run id is taken once
        done = job().execute_in_process(asset_selection=steps, run_id=root, instance=other)
        run = other.get_run_by_id(root)
        assert run is not None
        assert run.tags.items() >= {"tide/target": config.target, "tide/workload": "code"}.items(), "the drift sensor finds it by these"
        return done, run.tags["tide/passed"]


def looked(instance: dg.DagsterInstance) -> dg.SensorResult:
    found = alias_sensor(dg.build_sensor_context(instance=instance), tide=TideResource())
    assert isinstance(found, dg.SensorResult)
    return found


def _traffic(config: TideConfig, build: EngineBuild) -> None:
    recorder = Recorder(CaptureSettings(mode="on", flush_s=60.0), config.target, config.state.lake, "replica-0")
    spec = load_engine_spec(config.engine_dir)
    engine = tiny_engine(config.engine_dir / spec.model, spec=spec, drafts=build, sink=recorder)
    letters = random.Random(0)
    generate(engine, *(ask(f"r-{i}", "".join(letters.choices("abcdefgh", k=10)), workload="code", max_tokens=40, ignore_eos=True)
                       for i in range(24)))
    engine.close()
    recorder.close()
