"""The pipeline's processes killed while an adaptation is under way: trainer, run worker at every stage, code server, daemon, MLflow."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import inject
import pytest

from tests.faults.converged import assert_converged, look
from tests.faults.loop import PATIENCE_S, Loop, tiny_loop, until

pytestmark = [pytest.mark.faults, pytest.mark.filterwarnings("ignore::Warning:mlflow.*"),
              pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    with tiny_loop(tmp_path_factory.mktemp("loop")) as made:
        yield made


def snapshot(loop: Loop, run_id: str) -> Path:
    return loop.config.state.training / run_id / "draft" / "resume.safetensors"


def test_a_killed_trainer_goes_on_from_its_snapshot(loop: Loop) -> None:
    before, run_id = look(loop), loop.launch("trainer killed")
    trainer = loop.pid("trainer")
    until(snapshot(loop, run_id).is_file, "no snapshot was written")
    killed_at = time.monotonic()
    assert inject.kill(loop.id, "trainer") == [trainer]
    inject.wait_for(loop.id, "trainer", PATIENCE_S, other_than=[trainer])
    back_s = time.monotonic() - killed_at
    view = loop.await_success(run_id)
    assert view.run_id == run_id, "the step was tried again, not the run"
    print(f"FAULT trainer: trains again after {back_s:.1f} s, converged after {assert_converged(loop, before):.1f} s more")


@pytest.mark.parametrize("steps", [("draft_checkpoint", "benchmark_report"), ("registered_draft", "live_draft"), ("draft_engine",)],
                         ids=lambda steps: "+".join(steps))
def test_a_run_whose_worker_is_killed_goes_on_from_that_step(loop: Loop, steps: tuple[str, ...]) -> None:
    """Twice in one adaptation, where two are named. The pool's place comes back each time."""
    before, run_id = look(loop), loop.launch(f"worker killed in {steps}")
    for step in steps:
        loop.await_step(run_id, step)
        if step == "draft_checkpoint":
            loop.pid("trainer")
            assert loop.slot_holders() == {run_id}
        lost, killed_at = loop.run(run_id).run_id, time.monotonic()
        assert inject.kill(loop.id, "run_worker")
        until(lambda lost=lost: lost not in loop.slot_holders(), "the dead run keeps its place in the pool")
        free_s = time.monotonic() - killed_at
        until(lambda lost=lost: loop.run(run_id).run_id != lost, "nothing went on with it")
        print(f"FAULT worker in {step}: place free after {free_s:.1f} s, run again after {time.monotonic() - killed_at:.1f} s")
    view = loop.await_success(run_id)
    assert view.tags["dagster/root_run_id"] == run_id
    if steps[0] != "draft_checkpoint":
        assert "draft_checkpoint" not in view.steps, "what was trained is not trained again"
    print(f"FAULT worker: converged after {assert_converged(loop, before):.1f} s more")
