"""How the trainer is started, and which of its ends are worth a second try."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.events import EngineEventData
from dagster._utils.error import SerializableErrorInfo

from tide_pipeline import recipes
from tide_pipeline.config import TideConfig, override
from tide_pipeline.contracts import EngineBuild
from tide_pipeline.definitions import defs
from tide_pipeline.defs.adaptation import Adaptation, Request
from tide_pipeline.defs.draft import AdaptConfig, understood
from tide_pipeline.defs.limits import AWAY_S, AWAY_TRIES
from tide_pipeline.defs.trainer import (
    DagsterPipesExecutionError,
    after_a_failed_training,
    last_words_of,
    times_waited,
    training_command,
    training_environment,
)
from tide_pipeline.errors import BuildError, SettingsError
from tide_pipeline.training.launch import AWAY as AWAY_CODE
from tide_pipeline.training.launch import launch

CHAMPION = EngineBuild("0123456789abcdef", "pocket", "embedded", "/builds/0123456789abcdef", "v3-11112222", "d" * 64, "e" * 64, 0.0)


@pytest.fixture
def adaptation(tmp_path: Path) -> Adaptation:
    made = Adaptation.of(TideConfig(state_dir=str(tmp_path)), "run-2", "run-1")
    made.save("request", Request("code", "it fell"))
    return made


def test_a_re_execution_shares_the_folder_of_its_root(tmp_path: Path) -> None:
    config = TideConfig(state_dir=str(tmp_path))
    assert Adaptation.of(config, "run-2", "run-1") == Adaptation.of(config, "run-1") != Adaptation.of(config, "run-2")


def test_a_step_alone_says_what_to_launch(adaptation: Adaptation) -> None:
    assert adaptation.request() == Request("code", "it fell")
    with pytest.raises(BuildError, match="launch the job adapt_draft, or re-execute its run"):
        adaptation.build()
    (adaptation.folder / "build.json").write_text("{")
    with pytest.raises(BuildError, match="can't be read"):
        adaptation.build()


def test_the_command_line_warm_starts_from_the_champion(adaptation: Adaptation) -> None:
    begin = [sys.executable, "-m", "tide_pipeline.training", "--workload", "code", "--out", str(adaptation.draft)]
    assert training_command(adaptation, None) == begin
    adaptation.save("request", Request("code", focus_since=12.5))
    assert training_command(adaptation, CHAMPION) == [
        *begin, "--champion", "/builds/0123456789abcdef/draft", "--parent", "v3-11112222", "--focus-since", "12.5"]


def test_a_past_window_is_asked_for_by_run_config(adaptation: Adaptation) -> None:
    asked = understood(AdaptConfig(workload="code", since="2026-11-20T10:00+01:00", until="2026-11-20T12:00"))
    assert asked == Request("code", "a draft over what was captured since 2026-11-20T09:00:00Z until 2026-11-20T12:00:00Z",
                            since="2026-11-20T09:00:00Z", until="2026-11-20T12:00:00Z")
    adaptation.save("request", asked)
    assert training_command(adaptation, None)[-4:] == ["--since", "2026-11-20T09:00:00Z", "--until", "2026-11-20T12:00:00Z"]
    assert understood(AdaptConfig(reason="I want it", until="2026-11-20")).reason == "I want it"
    with pytest.raises(dg.Failure, match=r"ops.draft_checkpoint.config: since '20.11.2026' is no time") as refused:
        understood(AdaptConfig(since="20.11.2026"))
    assert not refused.value.allow_retries


@pytest.mark.parametrize(("device", "ours", "visible", "named"), [
    ("cpu", "", "", "cpu"), ("cpu", "3", "", "cpu"), ("cuda", "", "0", "cuda"), ("cuda:1", "", "1", "cuda"),
    ("cuda:1", "4,6", "6", "cuda")])
def test_the_trainer_sees_its_own_device(adaptation: Adaptation, device: str, ours: str, visible: str, named: str) -> None:
    config = override(TideConfig(), {"training": {"device": device}})
    environment = training_environment(config, adaptation, {"CUDA_VISIBLE_DEVICES": ours})
    assert environment["CUDA_VISIBLE_DEVICES"] == visible
    read = recipes.load(file=Path(environment["TIDE_CONFIG"]))
    assert dataclasses.replace(read.training, device=device) == config.training and read.training.device == named


def test_a_device_that_is_not_ours_is_refused(adaptation: Adaptation) -> None:
    config = override(TideConfig(), {"training": {"device": "cuda:2"}})
    with pytest.raises(SettingsError, match="cuda:1 is the last"):
        training_environment(config, adaptation, {"CUDA_VISIBLE_DEVICES": "4,6"})


@pytest.mark.parametrize(("code", "again"), [(-9, True), (130, True), (75, True), (1, False), (2, False)])
def test_a_crash_is_tried_again_and_a_storage_that_is_away(code: int, again: bool) -> None:
    end = after_a_failed_training(DagsterPipesExecutionError(f"External execution process failed with code {code}"), "LakeError: empty")
    assert isinstance(end, dg.RetryRequested if again else dg.Failure)
    assert again or end.description == "LakeError: empty"


def test_a_storage_that_is_away_is_waited_for_and_costs_no_crash_its_second_try() -> None:
    def ended(code: int, waited: int = 0) -> dg.RetryRequested:
        end = after_a_failed_training(DagsterPipesExecutionError(f"External execution process failed with code {code}"), "", waited)
        assert isinstance(end, dg.RetryRequested)
        return end

    assert (ended(75).max_retries, ended(75).seconds_to_wait) == (AWAY_TRIES, AWAY_S)
    given_up = after_a_failed_training(DagsterPipesExecutionError("process failed with code 75"), "LakeAway: can't list it", AWAY_TRIES)
    assert isinstance(given_up, dg.Failure) and given_up.description == "LakeAway: can't list it", "not a number"
    assert ended(-9).max_retries == 1 and ended(-9, waited=3).max_retries == 4, "Dagster counts the three as tries, too"


def test_tries_that_waited_are_told_from_crashes() -> None:
    ends = iter([after_a_failed_training(DagsterPipesExecutionError(f"failed with code {code}"), "") for code in (75, -9, 75)])

    @dg.op
    def ending() -> None:
        for end in ends:
            assert isinstance(end, dg.RetryRequested)
            raise dg.RetryRequested(max_retries=9, seconds_to_wait=0.1 if end.seconds_to_wait == AWAY_S else end.seconds_to_wait)

    @dg.job(executor_def=dg.in_process_executor)
    def training() -> None:
        ending()

    with dg.DagsterInstance.ephemeral() as instance:
        done = training.execute_in_process(instance=instance)
        assert done.success and times_waited(instance, done.run_id) == 2


def test_a_team_ends_for_the_storage_when_any_of_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others fail for want of the first one: what they say is not why."""
    (tmp_path / "tide_pipeline").mkdir()
    (tmp_path / "tide_pipeline" / "__init__.py").touch()
    (tmp_path / "tide_pipeline" / "training.py").write_text("import os; raise SystemExit([75, 1][int(os.environ['RANK'])])")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert launch(2, []) == AWAY_CODE == 75


def test_what_the_trainer_gave_as_its_reason() -> None:
    """Pipes reports the exception that the process closed with as an engine event of the run."""
    with dg.DagsterInstance.ephemeral() as instance:
        run = instance.create_run_for_job(defs().resolve_job_def("adapt_draft"))
        assert last_words_of(instance, run.run_id) == ""
        said = SerializableErrorInfo("tide_pipeline.errors.NotEnoughSignals: 0 requests\nof it", ["a stack"], "NotEnoughSignals")
        instance.report_engine_event("[pipes] external process pipes closed with exception", run, EngineEventData(error=said))
        instance.report_engine_event("Finished steps in process", run, EngineEventData.in_process(1))
        assert last_words_of(instance, run.run_id) == "tide_pipeline.errors.NotEnoughSignals: 0 requests"
