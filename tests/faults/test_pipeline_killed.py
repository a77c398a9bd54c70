"""The pipeline's processes killed while an adaptation is under way: trainer, run worker at every stage, code server, daemon, MLflow."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import inject
import pytest

from tests.faults.converged import assert_converged, look
from tests.faults.loop import PATIENCE_S, Loop, tiny_loop, until

pytestmark = [pytest.mark.faults, pytest.mark.filterwarnings("ignore::Warning:mlflow.*"),
              pytest.mark.filterwarnings("ignore::ResourceWarning")]


SILENT_S = 100.0                   # longer than MLflow's client waits by itself (three tries of 20 s)


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


def test_a_run_outlives_the_code_server_that_started_it(loop: Loop) -> None:
    """And the next run starts on the server that took its place."""
    before, run_id = look(loop), loop.launch("code server killed")
    trainer, worker = loop.pid("trainer"), loop.pid("run_worker")
    print(f"FAULT dagster_code: back after {loop.kill_and_await('dagster_code'):.1f} s")
    assert [p.pid for p in inject.processes(loop.id, "trainer")] == [trainer]
    assert [p.pid for p in inject.processes(loop.id, "run_worker")] == [worker]
    view = loop.await_success(run_id)
    assert view.run_id == run_id, "it was never given up"
    print(f"FAULT dagster_code: converged after {assert_converged(loop, before):.1f} s")


def test_a_queued_run_survives_the_daemon(loop: Loop) -> None:
    """Launched through the new code server and webserver, killed between queue and start."""
    before = look(loop)
    back_s = loop.kill_and_await("dagster_web")
    run_id = loop.launch("daemon killed")
    print(f"FAULT dagster_daemon: back after {loop.kill_and_await('dagster_daemon'):.1f} s, webserver after {back_s:.1f} s")
    began = time.monotonic()
    loop.await_step(run_id, "draft_checkpoint")
    print(f"FAULT dagster_daemon: the queued run started after {time.monotonic() - began:.1f} s")
    loop.await_success(run_id)
    print(f"FAULT dagster_daemon: converged after {assert_converged(loop, before):.1f} s")


def test_mlflow_killed_and_then_silent_for_minutes(loop: Loop) -> None:
    """Killed while the draft trains; silent from before it is registered: what was trained waits, and is trained once."""
    before, run_id = look(loop), loop.launch("MLflow away")
    loop.pid("trainer")
    back_s = loop.kill_and_await("mlflow")
    inject.wait_for(loop.id, "mlflow_worker", PATIENCE_S)
    thaw = [inject.freeze(loop.id, role) for role in ("mlflow", "mlflow_worker")]
    try:
        loop.await_step(run_id, "registered_draft")
        time.sleep(SILENT_S)
        assert loop.run(run_id).status == "STARTED"
    finally:
        for go_on in thaw:
            go_on()
    began = time.monotonic()
    view = loop.await_success(run_id)
    assert view.run_id == run_id
    ended_s = time.monotonic() - began
    print(f"FAULT mlflow: back after {back_s:.1f} s; after {SILENT_S:.0f} s of silence the run ended {ended_s:.1f} s later, "
          f"converged after {assert_converged(loop, before):.1f} s")


def test_every_part_killed_once_at_a_random_moment(loop: Loop) -> None:
    """Of one adaptation, which ends all the same."""
    chance, roles = random.Random(6), ["trainer", "run_worker", "dagster_code", "dagster_daemon", "mlflow", "engine", "supervisor", "front"]
    chance.shuffle(roles)
    before, began, run_id = look(loop), time.monotonic(), loop.launch("everything killed")
    told = []
    for role in roles:
        time.sleep(chance.uniform(1.0, 8.0))
        killed = inject.kill(loop.id, role)
        told.append(f"{role} at {time.monotonic() - began:.0f} s{'' if killed else ' (not there)'}")
    loop.await_success(run_id)
    ended_s = time.monotonic() - began
    print(f"FAULT random: {', '.join(told)}; done after {ended_s:.0f} s, converged after {assert_converged(loop, before):.1f} s")
