"""The job adapt_draft in one process on a tiny target: real training, MLflow on SQLite, build, gate, rollout to a fake replica."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from tests.fakes_rollout import FakeReplica, write_engine
from tests.helpers import ask, generate, tiny_engine, write_tiny_build
from tide_pipeline import recipes
from tide_pipeline.capture.recorder import Recorder
from tide_pipeline.config import CaptureSettings, TideConfig, load_engine_spec, override
from tide_pipeline.contracts import EngineBuild
from tide_pipeline.definitions import defs
from tide_pipeline.deployment.builds import load_build
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.models.target import Target
from tide_pipeline.registry.registry import open_registry
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
    monkeypatch.setenv("TIDE_MLFLOW_URI", "http://127.0.0.1:9")
    asked = {"ops": {"draft_checkpoint": {"config": {"workload": "code", "reason": "acceptance fell"}}}}
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
    assert open_registry(config).alias("champion") == draft.version
    assert draft.tags["workload"] == "code" and draft.tags["dagster_run_id"] == failed.run_id
    numbers = {event.asset_key.to_user_string(): event.materialization.metadata for event in done.get_asset_materialization_events()}
    assert numbers["benchmark_report"]["acceptance_length"].value >= 1.0 and numbers["benchmark_report"]["mismatches"].value == 0


def test_a_refused_draft_is_not_rolled_out(config: TideConfig, instance: dg.DagsterInstance) -> None:
    """The steps after the build once more, with a gate that nothing passes."""
    strict = override(config, {"gate": {"min_gain": 9.0}})
    recipes.freeze(strict, Path(config.engines_dir).parent / "settings.toml")
    before = DeploymentRecord(config.state.deployments, config.target).latest()
    root = min(instance.get_run_records(), key=lambda record: record.create_timestamp).dagster_run.run_id
    gate = [dg.AssetKey("benchmark_report"), dg.AssetKey("live_draft")]
    refused = job().execute_in_process(asset_selection=gate, run_id=root, raise_on_error=False)
    assert not refused.success
    (checked,) = refused.get_asset_check_evaluations()
    assert not checked.passed and "the gain is below 9.00" in (checked.description or "")
    assert [event.asset_key.to_user_string() for event in refused.get_asset_materialization_events()] == ["benchmark_report"]
    assert DeploymentRecord(config.state.deployments, config.target).latest() == before


def test_the_way_back(config: TideConfig) -> None:
    record = DeploymentRecord(config.state.deployments, config.target)
    shipped = record.history()[0].groups["rest"]
    assert rollback_job().execute_in_process(run_config={"ops": {"roll_back": {"config": {"reason": "a drill"}}}}).success
    latest = record.latest()
    assert latest is not None and latest.groups["rest"] == shipped and latest.reason == "a drill"


def _traffic(config: TideConfig, build: EngineBuild) -> None:
    recorder = Recorder(CaptureSettings(mode="on", flush_s=60.0), config.target, config.state.lake, "replica-0")
    spec = load_engine_spec(config.engine_dir)
    engine = tiny_engine(config.engine_dir / spec.model, spec=spec, drafts=build, sink=recorder)
    letters = random.Random(0)
    generate(engine, *(ask(f"r-{i}", "".join(letters.choices("abcdefgh", k=10)), workload="code", max_tokens=40, ignore_eos=True)
                       for i in range(24)))
    engine.close()
    recorder.close()
