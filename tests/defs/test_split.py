"""Seconds of each stage from the times that the steps and the deployment record leave behind; what happens meanwhile."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fakes_capture import SLOW, FakeEngine
from tide_pipeline.capture.recorder import Recorder
from tide_pipeline.config import TideConfig, override
from tide_pipeline.contracts import Deployment
from tide_pipeline.defs import tags
from tide_pipeline.defs.adaptation import Adaptation, Request
from tide_pipeline.defs.meanwhile import meanwhile
from tide_pipeline.defs.promotion import mark_collected
from tide_pipeline.defs.split import split, without_waiting
from tide_pipeline.stack import stages
from tide_pipeline.stack.runs import RunView

MARKS = {"drifted": 100.0, "collected": 130.0, "begun": 133.0, "trained": 200.0, "registered": 202.0, "built": 203.5, "judged": 210.0}


def deployment(n: int, stage: str, at: float, began: int) -> Deployment:
    return Deployment(n, "tiny", {"rest": {}}, (), stage, "me", "", at, "*", began)


ROLLOUT = [deployment(1, "stable", 1.0, 0), deployment(2, "canary", 210.5, 2), deployment(3, "rolling", 217.0, 2),
           deployment(4, "rolling", 219.5, 2), deployment(5, "stable", 222.0, 2), deployment(6, "canary", 900.0, 6)]


def test_every_second_is_in_one_stage() -> None:
    found = split(MARKS, ROLLOUT, ROLLOUT[4])
    assert found == {"collect": 30.0, "start": 3.0, "train": 67.0, "register": 2.0, "build": 1.5, "gate": 6.5, "bake": 6.5, "roll out": 5.5}
    assert sum(found.values()) == ROLLOUT[4].created_at - MARKS["drifted"] and without_waiting(found) == 18.5


def test_collecting_ends_when_enough_was_captured_and_a_run_may_be_on_its_way_by_then() -> None:
    waited = split({**MARKS, "collected": 128.0, "asked": 130.0}, ROLLOUT, ROLLOUT[4])
    assert (waited["collect"], waited["start"]) == (28.0, 5.0), "for the sensor's tick too"
    ahead = split({**MARKS, "collected": 133.0, "asked": 130.0}, ROLLOUT, ROLLOUT[4])
    assert (ahead["collect"], ahead["start"]) == (33.0, 0.0)
    by_hand = {stage: at for stage, at in MARKS.items() if stage not in ("drifted", "collected")}
    assert split({**by_hand, "asked": 131.0}, ROLLOUT, ROLLOUT[4])["start"] == 2.0


@pytest.mark.parametrize(("rows", "asked", "begun", "collected"), [
    (13, 108.0, 112.0, 101.0),                                 # 7 s before it was asked for: a tick
    (26, 112.0, 115.0, 111.0),                                 # asked for ahead
    (26, 107.0, 109.0, 109.0),                                 # there when the trainer looked, after its process was
    (39, 107.0, 109.0, None),                                  # not there: all of the launch counts
    (13, 150.0, 155.0, 140.0),                                 # something else held it up
])
def test_when_enough_was_captured_is_worked_out_from_the_lake(tmp_path: Path, rows: int, asked: float, begun: float,
                                                            collected: float | None) -> None:
    settings = override(TideConfig(), {"engine": "tiny", "state_dir": str(tmp_path), "drift": {"min_signal_rows": rows}})
    began = time.time() - 200.0
    for name, at in (("a", 101.0), ("b", 111.0), ("c", 130.0)):                                    # 13 rows each
        recorder = Recorder(SLOW, settings.target, settings.state.lake, "replica-0", clock=lambda at=at: began + at)
        FakeEngine(recorder).run(name, workload="code")
        recorder.close()
    adaptation = Adaptation(tmp_path / "run")
    adaptation.save("request", Request("code", focus_since=began + 95.0, drifted_at=began + 100.0))
    adaptation.mark(asked=began + asked, begun=began + begun)
    mark_collected(settings, adaptation)
    found = adaptation.marks().get("collected")
    assert (found is None) == (collected is None) and (found is None or found - began == pytest.approx(collected, abs=0.01))


def test_what_the_demo_shows_begins_with_the_shift(tmp_path: Path) -> None:
    run = RunView("r1", "SUCCESS", 130.0, 131.0, 222.0, {stages.DRIFTED_AT: "100.0"}, {})
    assert stages.detection_of(run, 95.0) == {"detect": 5.0, "collect": 30.0}
    assert stages.detection_of(run, 104.0) == {"detect": 0.0, "collect": 26.0}, "it was drifting before"
    assert stages.stages_of(run, tmp_path) == {}
    (tmp_path / "r1").mkdir()
    (tmp_path / "r1" / "stages.json").write_text('{"collect": 33.0, "gate": 9}')
    assert stages.stages_of(run, tmp_path, 95.0) == {"collect": 33.0, "gate": 9.0}
    assert stages.stages_of(run, tmp_path, 104.0) == {"collect": 29.0, "gate": 9.0}


def test_the_demo_shows_stages_as_they_follow_each_other() -> None:
    heard = {"detect": 4.0, "collect": 45.0, **split(MARKS, ROLLOUT, ROLLOUT[4])}
    heard_of_late = {stage: heard[stage] for stage in sorted(heard)}
    assert list(stages.in_order(heard_of_late)) == list(stages.ORDER) == ["detect", *split(MARKS, ROLLOUT, ROLLOUT[4])]


def test_the_tag_that_tells_detection_is_the_one_that_the_sensor_sets() -> None:
    """The stack's tools read runs over HTTP and must not import Dagster's definitions, nor these them."""
    assert tags.DRIFTED_AT == stages.DRIFTED_AT


def test_what_is_not_known_is_left_out() -> None:
    by_hand = {stage: at for stage, at in MARKS.items() if stage not in ("drifted", "registered")}
    assert list(split(by_hand, ROLLOUT, ROLLOUT[4])) == ["start", "train", "gate", "bake", "roll out"]
    unwatched = deployment(2, "stable", 211.0, 0)
    at_once = split(MARKS, [ROLLOUT[0], unwatched], unwatched)
    assert (at_once["bake"], at_once["roll out"]) == (0.0, 1.0)
    served_before = split(MARKS, ROLLOUT[:1], ROLLOUT[0])
    assert served_before["roll out"] == 0.0, "nothing was rolled out"


def test_marks_outlive_the_step_and_break_nothing(tmp_path: Path) -> None:
    adaptation = Adaptation(tmp_path / "run")
    assert adaptation.marks() == {}
    adaptation.mark(collected=1.0, begun=2.0)
    adaptation.mark(begun=3.0)
    assert adaptation.marks() == {"collected": 1.0, "begun": 3.0}
    (tmp_path / "run" / "marks.json").write_text("[")
    assert adaptation.marks() == {}


def test_modules_are_imported_meanwhile_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("tide_test_one", "tide_test_two", "tide_test_three"):
        (tmp_path / f"{name}.py").write_text("")
    with meanwhile(modules=["tide_test_one", "there_is_no_such_module", "tide_test_two"], after_s=0.0):
        until(lambda: "tide_test_one" in sys.modules)
    with meanwhile(modules=["tide_test_three"], after_s=0.3):
        pass
    time.sleep(0.5)
    assert "tide_test_three" not in sys.modules, "the block ended sooner"


def test_work_is_done_again_until_the_block_ends_whatever_it_raises() -> None:
    calls: list[float] = []

    def work() -> None:
        calls.append(time.monotonic())
        raise RuntimeError("the lake is away")

    with meanwhile(work, modules=[], after_s=0.0, again_s=0.05):
        until(lambda: len(calls) >= 3)
    done = len(calls)
    time.sleep(0.3)
    assert len(calls) <= done + 1, "one that was under way may end"


def until(is_true: Callable[[], bool]) -> None:
    gives_up = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < gives_up
        time.sleep(0.02)
