"""What trainings cost in a report: of real ones that finished, failed or were killed, after their builds and weights have gone."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest

from tests.fakes_drift import deploy, traffic, write_build, write_log
from tests.fakes_report import write_gate
from tests.fakes_training import engine_with_lake
from tide_pipeline.config import TideConfig, override
from tide_pipeline.contracts import EngineBuild
from tide_pipeline.defs.adaptation import Adaptation, Request
from tide_pipeline.deployment.builds import list_builds, save_build
from tide_pipeline.errors import NotEnoughSignals
from tide_pipeline.provenance import write_json
from tide_pipeline.recipes import freeze
from tide_pipeline.registry.registry import Registry
from tide_pipeline.report.data import ReportData
from tide_pipeline.report.page import render
from tide_pipeline.report.period import collect, drafts_of
from tide_pipeline.report.training_folder import TrainingFolder, training_folders
from tide_pipeline.rollout.tidy import YOUNG_S, tidy_builds
from tide_pipeline.rollout.tidy_drafts import InUse, tidy_drafts
from tide_pipeline.training.loop import TrainingInterrupted, train_draft
from tide_pipeline.training.progress import FileViewer, TrainProgress

TRAINING = {"time_budget_s": 0.0, "max_steps": 12, "eval_every_steps": 4, "eval_share": 0.25, "window_rows": 48, "min_prompts": 4}
PATIENCE_S = 300                   # a busy machine starts a process slowly
DAYS_30 = 30 * 86_400.0


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TideConfig:
    return engine_with_lake(tmp_path_factory.mktemp("trainings"), TRAINING, de=16, py=2)


@pytest.fixture
def config(engine: TideConfig, tmp_path: Path) -> TideConfig:
    """A state of its own beside the lake that all train on."""
    return override(engine, {"state_dir": str(tmp_path / "state"), "lake": str(engine.state.lake)})


def asked_for(config: TideConfig, run_id: str = "0123456789-run") -> Adaptation:
    """As Dagster leaves the folder when it starts the trainer."""
    adaptation, now = Adaptation.of(config, run_id), time.time()
    adaptation.save("request", Request("de", "drop 0.42", focus_since=now - config.drift.recent_s - 1, drifted_at=now - 1))
    freeze(config, adaptation.folder / "settings.toml")
    adaptation.mark(begun=now)
    return adaptation


def train(config: TideConfig, folder: Path, *, steps: int = 99, workload: str = "de") -> None:
    """The trainer's own work and its progress file; stopped by a signal after so many steps."""
    asked = iter([*[False] * steps, True])
    train_draft(config, workload=workload, out_dir=folder, progress=FileViewer(folder / "progress.json").show,
                should_stop=lambda: next(asked))


def finished(config: TideConfig, run_id: str, version: str) -> EngineBuild:
    """Trained, registered, built and refused at the gate."""
    adaptation = asked_for(config, run_id)
    train(config, adaptation.draft)
    write_json(adaptation.folder / "registered.json", {"draft_version": version, "version": 2})
    build = dataclasses.replace(write_build(config, version * 8, version), draft_digest=adaptation.checkpoint().digest)
    save_build(build)
    shutil.copytree(adaptation.draft, Path(build.path) / "draft")
    adaptation.save("build", build)
    write_gate(config, build, time.time())
    return build


def page_of(config: TideConfig, since: float = 0.0, **more: Any) -> ReportData:
    now = time.time()
    return collect(config, since or now - DAYS_30, now + 1, **{"with_savings": False, **more})


def in_words(data: ReportData) -> str:
    return render(dataclasses.replace(data, series=()))


# --- a draft that was refused -------------------------------------------------------------------------------------

def test_what_a_refused_draft_cost_is_told_after_its_build_and_weights_went(config: TideConfig) -> None:
    rows = traffic(random.Random(1), time.time() - 60, time.time(), 0.7, draft_version="v0")
    write_log(config, rows, target=config.target)
    deploy(config, {"*": write_build(config, "v0" * 8, "v0").build_id}, time.time() - 60)
    refused = finished(config, "aaaa", "v2")
    before = page_of(config, with_savings=True)
    (trained,) = before.trainings
    assert trained.draft_version == "v2" and trained.seconds > 0 and trained.length >= 1 and trained.rows > 0
    assert trained.ended - trained.began == pytest.approx(trained.seconds, abs=0.01)
    assert before.savings is not None and before.savings.training_s == trained.seconds

    asked_for(config, "bbbb")                              # a newer one, so that the settings may let go of the first
    tidied = tidy_drafts(override(config, {"retention": {"training_keep": 1}}), cast(Registry, None), InUse(), time.time())
    assert tidied.adaptations == ("aaaa",) and tidy_builds(config, time.time() + YOUNG_S + 60) == [refused.build_id]
    shutil.rmtree(config.state.training / "bbbb")
    after = page_of(config, before.since, with_savings=True)
    assert [b.draft_version for b in list_builds(config.state.builds, config.target)] == ["v0"]
    assert after.savings is not None and after.savings.training_s == trained.seconds
    for name in ("trainings", "training", "gates", "drifts", "versions", "deployments"):
        assert getattr(after, name) == getattr(before, name), name
    assert [d.draft_version for d in after.drifts] == ["v2"] and [v.challenger for v in after.gates] == ["v2"]


def test_a_draft_whose_build_went_is_found_where_it_was_trained(config: TideConfig) -> None:
    build = finished(config, "aaaa", "v2")
    assert drafts_of(list_builds(config.state.builds, config.target), training_folders(config)) == {"v2": Path(build.path) / "draft"}
    assert drafts_of([], training_folders(config)) == {"v2": config.state.training / "aaaa" / "draft"}
    (config.state.training / "aaaa" / "draft" / "model.safetensors").unlink()
    assert drafts_of([], training_folders(config)) == {}


def test_what_was_trained_elsewhere_counts_while_its_build_is_there(config: TideConfig, tmp_path: Path) -> None:
    train(config, tmp_path / "elsewhere")
    build = write_build(config, "v7" * 8, "v7")
    shutil.copytree(tmp_path / "elsewhere", Path(build.path) / "draft")
    assert [t.draft_version for t in page_of(config).trainings] == ["v7"]


def test_a_damaged_certificate_leaves_what_the_checkpoint_says(config: TideConfig) -> None:
    finished(config, "aaaa", "v2")
    whole, draft = page_of(config), config.state.training / "aaaa" / "draft"
    tidy_builds(config, time.time() + YOUNG_S + 60)
    (draft / "provenance.json").write_text("{")
    (found,) = page_of(config).trainings
    assert found.seconds == whole.trainings[0].seconds and found.length == whole.trainings[0].length and found.draft_version == "v2"


# --- no draft -----------------------------------------------------------------------------------------------------

def test_a_training_that_was_stopped_counts_what_it_took(config: TideConfig) -> None:
    adaptation = asked_for(config)
    with pytest.raises(TrainingInterrupted):
        train(config, adaptation.draft, steps=6)
    took, curve = time.time() - adaptation.marks()["begun"], (adaptation.draft / "metrics.jsonl").read_text().splitlines()
    data = page_of(config)
    (found,) = data.trainings
    assert 0 < json.loads(curve[-1])["elapsed_s"] <= found.seconds <= took
    assert found.draft_version == "" and not data.untimed_trainings
    assert [d.draft_version for d in data.drifts] == ["–"] and not data.training
    assert "none: run 01234567, last seen evaluating" in in_words(data) and "s in 1 without a draft" in in_words(data)

    train(config, adaptation.draft)                        # the run goes on from its snapshot and ends well
    (found,) = page_of(config).trainings
    assert found.draft_version and not found.without_draft


def test_a_second_attempt_that_died_early_loses_nothing_of_the_first(config: TideConfig) -> None:
    adaptation = asked_for(config)
    with pytest.raises(TrainingInterrupted):
        train(config, adaptation.draft, steps=6)
    curve = (adaptation.draft / "metrics.jsonl").read_text().splitlines()
    FileViewer(adaptation.draft / "progress.json").show(TrainProgress("loading", "de"))
    adaptation.mark(begun=time.time())
    (found,) = page_of(config).trainings
    assert found.seconds == json.loads(curve[-1])["elapsed_s"] and found.without_draft.endswith("last seen loading")


def test_a_killed_trainer_counts_until_its_last_word(config: TideConfig) -> None:
    config = override(config, {"training": {"max_steps": 10**6, "eval_every_steps": 0, "eval_every_s": 600.0, "time_budget_s": 600.0}})
    adaptation = asked_for(config)
    begun = adaptation.marks()["begun"]
    command = [sys.executable, "-m", "tide_pipeline.training", "--workload", "de", "--out", str(adaptation.draft)]
    trainer = subprocess.Popen(command, env={**os.environ, "TIDE_CONFIG": str(adaptation.folder / "settings.toml"),
                                             "PYTHONPATH": os.pathsep.join(sys.path)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    folder, deadline = TrainingFolder(adaptation.folder), time.monotonic() + PATIENCE_S
    try:
        while not folder.progress.get("share") and trainer.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
            folder = TrainingFolder(adaptation.folder)
    finally:
        trainer.send_signal(signal.SIGKILL)
        _, said = trainer.communicate()
    assert folder.progress.get("share"), said.decode()
    (found,) = page_of(config).trainings
    last_word = json.loads((adaptation.draft / "progress.json").read_text())["at"]
    assert found.seconds == pytest.approx(last_word - begun) and found.without_draft == "run 01234567, last seen training"

    (adaptation.folder / "marks.json").unlink()            # `tide train` writes none: the share of the budget tells
    (alone,) = page_of(config).trainings
    assert 0 < alone.seconds < found.seconds


def test_one_that_never_began_leaves_no_record_and_the_page_says_so(config: TideConfig) -> None:
    adaptation = asked_for(config)
    assert page_of(config).untimed_trainings == 1, "a trainer that never spoke"
    with pytest.raises(NotEnoughSignals):
        train(config, adaptation.draft, workload="nobody")
    (found,) = page_of(config).trainings                   # from its start to its last word
    assert found.seconds > 0 and "last seen loading" in found.without_draft
    (adaptation.folder / "marks.json").unlink()
    data = page_of(config)
    assert data.untimed_trainings == 1 and not data.trainings
    assert "1 training left no record of their time" in in_words(data)


def test_a_version_that_was_judged_by_hand_was_not_trained(config: TideConfig) -> None:
    """judge_challenger leaves a folder as well: what was asked for, what came out of the registry, and a build."""
    adaptation = Adaptation.of(config, "cccc")
    adaptation.save("request", Request("de", "version 4 was asked for in MLflow"))
    adaptation.mark(built=time.time(), judged=time.time())
    data = page_of(config)
    assert not data.untimed_trainings and not data.trainings


# --- whose, and when ----------------------------------------------------------------------------------------------

def test_another_target_of_the_same_state_has_its_own_page(config: TideConfig) -> None:
    finished(config, "aaaa", "v2")
    with pytest.raises(TrainingInterrupted):
        train(config, asked_for(config, "bbbb").draft, steps=6)
    other = page_of(override(config, {"engine": "other"}))
    assert not other.trainings and not other.drifts and not other.gates and not other.untimed_trainings
    tidy_builds(config, time.time() + YOUNG_S + 60)        # now only the training says whose its gate report is
    assert not page_of(override(config, {"engine": "other"})).gates and len(page_of(config).gates) == 1


def test_a_period_has_the_trainings_that_were_last_heard_of_in_it(config: TideConfig) -> None:
    with pytest.raises(TrainingInterrupted):
        train(config, asked_for(config).draft, steps=6)
    now = time.time()
    for since, until, count in ((now - 600, now + 1, 1), (now - 600, now - 300, 0), (now + 1, now + 2, 0)):
        assert len(collect(config, since, until, with_savings=False).trainings) == count


def test_by_hand_and_beside_it(config: TideConfig) -> None:
    folder = config.state.training / "by-hand-20261122-101500" / "draft"
    with pytest.raises(TrainingInterrupted):
        train(config, folder, steps=6)
    write_json(config.state.training / "fetched" / "v2" / "provenance.json", {"train_s": 5.0, "created_at": time.time(), "curve": []})
    (found,) = page_of(config).trainings
    assert found.without_draft == "by hand, last seen evaluating" and found.seconds > 0


def test_several_devices_cost_as_much_each(config: TideConfig) -> None:
    with pytest.raises(TrainingInterrupted):
        train(config, asked_for(config).draft, steps=6)
    (one,) = page_of(config).trainings
    two_devices = override(config, {"training": {"train_devices": ["cuda:0", "cuda:1"]}})
    freeze(two_devices, config.state.training / "0123456789-run" / "settings.toml")
    (two,) = page_of(config).trainings
    assert two.seconds == pytest.approx(2 * one.seconds) and two.began == one.began


@pytest.mark.parametrize("record", ["request.json", "marks.json", "settings.toml", "build.json", "registered.json", "draft/progress.json",
                                    "draft/checkpoint.json", "draft/metrics.jsonl", "draft/provenance.json"])
@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "training = 5", "\x00", '{"share": "x", "at": null, "begun": true}',
                                  '{"digest": "d", "created_at": "x", "train_s": "y"}', '{"digest": "d", "created_at": 5, "train_s": "y"}'])
def test_no_damaged_record_keeps_the_page_from_being_made(tmp_path: Path, record: str, text: str) -> None:
    config = override(TideConfig(), {"engine": "tiny", "state_dir": str(tmp_path / "state")})
    folder = config.state.training / "run"
    write_json(folder / "request.json", {"workload": "de", "focus_since": 1.0, "reason": "drop"})
    write_json(folder / "draft" / "checkpoint.json", {"digest": "d", "train_s": 1.0})
    (folder / record).write_text(text)
    render(collect(config, 0.0, time.time(), with_savings=False))
