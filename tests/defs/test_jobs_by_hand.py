"""Jobs that a person launches: what they change, what they are tagged with, and that a killed one is gone on with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from tests.fakes_rollout import FakeReplica, judged, write_engine
from tests.helpers import write_tiny_build
from tide_pipeline import recipes
from tide_pipeline.build.engine import build_engine
from tide_pipeline.config import TideConfig, override
from tide_pipeline.contracts import Deployment, EngineBuild
from tide_pipeline.definitions import defs
from tide_pipeline.defs.limits import REST_S, challenger_tags, longest_rollout_s, rollout_tags, waits_s
from tide_pipeline.defs.tags import AFTER, MAX_RUNTIME, REASON, RETRY, TARGET, WORKLOAD
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.models.target import Target
from tide_pipeline.registry.registry import open_registry
from tide_pipeline.registry.shipped import shipped_checkpoint
from tide_pipeline.rollout import drive, plan
from tide_pipeline.rollout import replicas as replicas_module
from tide_pipeline.rollout.drive import Driver
from tide_pipeline.rollout.history import STABLE, following
from tide_pipeline.rollout.initial import ensure_initial
from tide_pipeline.rollout.promote import propose

pytestmark = [pytest.mark.filterwarnings("ignore::Warning:mlflow.*"), pytest.mark.filterwarnings("ignore::Warning:alembic.*"),
              pytest.mark.filterwarnings("ignore::ResourceWarning")]


class Killed(BaseException): ...


@pytest.fixture
def config(tmp_path: Path, tiny_dir: Path, tiny_build: EngineBuild, monkeypatch: pytest.MonkeyPatch) -> TideConfig:
    """Mode observe, and a shipped draft that serves."""
    made = override(write_engine(tmp_path, tiny_dir, champion=Path(tiny_build.path) / "draft"), {"rollout": {"mode": "observe"}})
    recipes.freeze(made, tmp_path / "settings.toml")
    monkeypatch.setenv("TIDE_CONFIG", str(tmp_path / "settings.toml"))
    monkeypatch.setenv("TIDE_MLFLOW_URI", "http://127.0.0.1:9")        # away, unless a test brings it back
    monkeypatch.setattr(drive, "POLL_S", 0.05)
    monkeypatch.setattr(plan, "QUIET_S", 0.3)
    monkeypatch.setattr(replicas_module, "ERROR_GRACE_S", 0.2)
    monkeypatch.setattr("tide_pipeline.build.engine.warm_up_draft", lambda *_: {})
    assert ensure_initial(made) is not None
    return made


@pytest.fixture
def challenger(config: TideConfig, tmp_path: Path, tiny_target: Target) -> EngineBuild:
    draft = Path(write_tiny_build(tmp_path / "new", tiny_target, seed=5).path) / "draft"
    return build_engine(config, draft, "v2", warm_up=False)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        yield made


def launch(instance: dg.DagsterInstance, job: str, op: str = "", tags: dict[str, str] | None = None,
           **config: object) -> dg.ExecuteInProcessResult:
    run_config: dict[str, Any] = {"ops": {op: {"config": config}}} if op else {}
    return defs().resolve_job_def(job).execute_in_process(instance=instance, run_config=run_config, tags=tags, raise_on_error=False)


def tags_of(instance: dg.DagsterInstance, done: dg.ExecuteInProcessResult) -> dict[str, str]:
    run = instance.get_run_by_id(done.run_id)
    assert run is not None
    return dict(run.tags)


def why(done: dg.ExecuteInProcessResult, step: str) -> str:
    error = done.failure_data_for_node(step)
    assert error is not None and error.error is not None
    return (error.error.cause or error.error).message


def record(config: TideConfig) -> DeploymentRecord:
    return DeploymentRecord(config.state.deployments, config.target)


def latest(config: TideConfig) -> Deployment:
    found = record(config).latest()
    assert found is not None
    return found


def test_promote_serves_a_build_in_mode_observe_though_mlflow_is_away(
        config: TideConfig, challenger: EngineBuild, instance: dg.DagsterInstance) -> None:
    judged(config, challenger)
    done = launch(instance, "promote", "promote_build", build_id=challenger.build_id, reason="the customer waits")
    assert done.success, "the alias follows later; what is served was changed"
    assert latest(config).groups["rest"] == {"*": challenger.build_id} and latest(config).reason.startswith("the customer waits; ")
    assert latest(config).who == f"dagster run {done.run_id[:8]}"
    assert tags_of(instance, done).items() >= {TARGET: "tiny", WORKLOAD: "*", REASON: "the customer waits", AFTER: "1",
                                               **rollout_tags(config)}.items()


def test_promote_gives_one_workload_a_draft_of_its_own_and_the_alias_follows(
        config: TideConfig, challenger: EngineBuild, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIDE_MLFLOW_URI")
    judged(config, challenger)
    shipped = shipped_checkpoint(config)
    assert shipped is not None
    version = open_registry(config).register(shipped, lineage={"workload": "de"}, label="shipped").version
    done = launch(instance, "promote", "promote_build", build_id=challenger.build_id, workload="de")
    assert done.success and latest(config).groups["rest"].keys() == {"*", "de"}
    assert open_registry(config).alias("champion") == version


@pytest.mark.parametrize(("passed", "says"), [(None, "tide gate"), (False, "did not pass the gate")])
def test_promote_asks_the_gate_again(config: TideConfig, challenger: EngineBuild, instance: dg.DagsterInstance, passed: bool | None,
                                     says: str) -> None:
    if passed is not None:
        judged(config, challenger, passed=passed)
    done = launch(instance, "promote", "promote_build", build_id=challenger.build_id)
    assert not done.success and says in why(done, "promote_build") and latest(config).n == 1


def test_promote_says_why_its_build_went_back_and_is_not_tried_again(
        config: TideConfig, challenger: EngineBuild, instance: dg.DagsterInstance) -> None:
    """The worker was killed, the rollout sensor ended its rollout, Dagster runs the step again."""
    judged(config, challenger)
    with FakeReplica(config, "replica-0", breaks_on=challenger.draft_digest):
        first = launch(instance, "promote", "promote_build", build_id=challenger.build_id)
        ended = latest(config)
        tags = {**tags_of(instance, first), RETRY: "1"}
        again = launch(instance, "promote", "promote_build", tags, build_id=challenger.build_id)
    assert not first.success and ended.stage == "rolled_back" and "can't be loaded here" in why(first, "promote_build")
    assert not again.success and "can't be loaded here" in why(again, "promote_build") and latest(config) == ended


def test_who_joined_a_rollout_that_went_back_meanwhile_begins_no_second_one(
        config: TideConfig, challenger: EngineBuild, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launched while its canary stands, which somebody else opened; then the worker is killed, and live traffic sends the draft back."""
    def dies(*_: object) -> None:
        raise Killed

    judged(config, challenger)
    with FakeReplica(config, "replica-0", breaks_on=challenger.draft_digest):
        with monkeypatch.context() as patch:
            patch.setattr(Driver, "drive", dies)
            for _ in range(2):
                launch(instance, "promote", "promote_build", build_id=challenger.build_id)
        joined = instance.get_runs(limit=1)[0]
        assert latest(config).stage == "canary" and joined.tags[AFTER] == "1"
        Driver(config, "rollout sensor").drive(latest(config).began)
        again = launch(instance, "promote", "promote_build", {**joined.tags, RETRY: "1"}, build_id=challenger.build_id)
    assert not again.success and [d.stage for d in record(config).history()] == ["stable", "canary", "rolled_back"]


@pytest.mark.parametrize("is_over", [False, True], ids=["under way", "over"])
def test_an_approval_whose_worker_was_killed_is_gone_on_with(
        config: TideConfig, challenger: EngineBuild, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, is_over: bool) -> None:
    """Cut off where the canary record stands, as by a kill. What Dagster's daemon launches then has the dead run's tags and one more."""
    def dies(*_: object) -> None:
        raise Killed

    proposed = propose(config, challenger, judged(config, challenger), who="run 1", reason="drift on de")
    with FakeReplica(config, "replica-0", rates={challenger.draft_digest: 0.8}):
        with monkeypatch.context() as patch:
            patch.setattr(Driver, "drive", dies)
            assert not launch(instance, "approve_rollout", "approve_proposal", reason="looks good").success
        (killed,) = instance.get_runs()
        assert killed.tags.items() >= {TARGET: "tiny", WORKLOAD: "*", REASON: "looks good", AFTER: str(proposed.n),
                                       **rollout_tags(config)}.items()
        assert latest(config).stage == "canary"
        if is_over:
            Driver(config, "rollout sensor").drive(latest(config).began)
        done = launch(instance, "approve_rollout", "approve_proposal", {**killed.tags, RETRY: "1"}, reason="looks good")
    assert done.success and done.output_for_node("approve_proposal") == latest(config).n
    assert [d.stage for d in record(config).history()] == ["stable", "proposed", "canary", "stable"]


def test_a_person_who_launches_an_approval_again_means_what_is_proposed_now(
        config: TideConfig, challenger: EngineBuild, instance: dg.DagsterInstance) -> None:
    """Dagster copies a run's tags to its re-execution."""
    propose(config, challenger, judged(config, challenger), who="run 1", reason="drift on de")
    first = launch(instance, "approve_rollout")
    again = launch(instance, "approve_rollout", tags=tags_of(instance, first))
    assert first.success and not again.success and "nothing is proposed" in why(again, "approve_proposal")
    assert tags_of(instance, again)[AFTER] == str(latest(config).n)


def test_the_way_back_is_green_and_tagged_though_mlflow_is_away(
        config: TideConfig, challenger: EngineBuild, instance: dg.DagsterInstance) -> None:
    said = {REASON: "pager 4711", MAX_RUNTIME: "60"}
    for reason, tags, told in (("slower at night", {}, "slower at night"), ("a drill", said, "pager 4711")):
        record(config).append(following(latest(config), "tiny", {"rest": {"*": challenger.build_id}}, (), STABLE, "ada", "by hand"))
        done = launch(instance, "rollback", "roll_back", tags, reason=reason)
        assert done.success and latest(config).reason == reason and latest(config).groups == record(config).read(1).groups
        found = tags_of(instance, done)
        assert found[REASON] == told and TARGET not in found and WORKLOAD not in found, "launched again, it queues behind nothing"
        assert found[MAX_RUNTIME] == tags.get(MAX_RUNTIME, "600")
    assert any("aliases were not moved, the sensor will" in entry.user_message for entry in instance.all_logs(done.run_id))


def test_a_run_may_take_as_long_as_the_longest_rollout_its_settings_allow(config: TideConfig) -> None:
    slow = override(config, {"rollout": {"max_bake_s": 14_400.0, "steps": [0.1] * 9 + [1.0], "step_s": 600.0, "serve_timeout_s": 900.0}})
    needed_s = 14_400 + 900 + 11 * 1500
    assert longest_rollout_s(slow.rollout) == needed_s
    assert rollout_tags(slow) == {MAX_RUNTIME: str(int(REST_S + needed_s))}
    assert challenger_tags(slow) == {MAX_RUNTIME: str(int(REST_S + waits_s(2) + needed_s))}
    for job in ("promote", "approve_rollout", "judge_challenger"):
        assert MAX_RUNTIME not in defs().resolve_job_def(job).tags, "run monitoring would read the job's first"
