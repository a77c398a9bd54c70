"""The clock is set while things are under way: what compares times of the wall is asked with a clock that stepped. Fast; starts no stack.

Nobody can set the clock of a machine that others use, so the code's own clocks are arguments here. Dagster's sensors are timed by the wall
clock themselves, which no test can show (docs/reliability.md).
"""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import replace

import pytest

from tide_pipeline.config import RolloutSettings
from tide_pipeline.contracts import Deployment, ObservedState
from tide_pipeline.defs.episodes import Memory
from tide_pipeline.defs.janitor import is_alive
from tide_pipeline.rollout.bake import Evidence
from tide_pipeline.rollout.live import Rate
from tide_pipeline.rollout.plan import Kind, Sight, next_action
from tide_pipeline.rollout.replicas import fresh

NOW = 1_800_000_000.0
HOUR_S = 3600.0
CANARY = Deployment(2, "tiny", {"rest": {"*": "a"}, "canary": {"*": "b"}}, ("replica-0",), "canary", "test", "a step", NOW - 1.0, "*", 2)


def seen(name: str, at: float) -> ObservedState:
    build = "b" if name == "replica-0" else "a"
    return ObservedState(name, "tiny", 2, {"*": build}, {"*": build * 64}, 2.0, 100.0, "", at, 1)


def sight(now: float, reported: float) -> Sight:
    replicas = {name: seen(name, reported) for name in ("replica-0", "replica-1")}
    return Sight(replicas, {"a": "a" * 64, "b": "b" * 64}, Evidence(Rate(0.7, 0.01, 20, 4)), now)


def test_without_a_step_the_bake_goes_on() -> None:
    assert next_action(CANARY, sight(NOW, NOW), RolloutSettings()).kind is Kind.WAIT


def test_a_clock_that_is_set_back_ends_a_rollout_instead_of_keeping_it_open() -> None:
    action = next_action(CANARY, sight(NOW - HOUR_S, NOW - HOUR_S), RolloutSettings())
    assert action.kind is Kind.BACK and "the clock is 3599 s behind" in action.reason


def test_clocks_of_two_hosts_may_differ_by_seconds() -> None:
    assert next_action(CANARY, sight(NOW - 5.0, NOW - 5.0), RolloutSettings()).kind is Kind.WAIT


@pytest.mark.parametrize("reported", [NOW, NOW + HOUR_S], ids=["before they report again", "after it"])
def test_a_clock_that_is_set_forward_cuts_the_bake_short(reported: float) -> None:
    """Before the replicas report again they look silent: back. After it the time is up: wider, and watched on, as nothing was worse."""
    action = next_action(CANARY, sight(NOW + HOUR_S, reported), RolloutSettings())
    assert action.kind is (Kind.BACK if reported == NOW else Kind.WIDEN)


def test_a_replica_that_died_before_the_clock_was_set_back_does_not_seem_alive() -> None:
    assert set(fresh({"dead": seen("dead", NOW), "alive": seen("alive", NOW - HOUR_S)}, 10.0, NOW - HOUR_S)) == {"alive"}


def test_the_cursor_of_a_sensor_from_the_future_is_looked_past() -> None:
    memory = Memory.from_cursor(replace(Memory(), looked_at=NOW + HOUR_S).to_cursor())
    assert not 0 <= NOW - memory.looked_at < 2.0, "drift_sensor's own question: was it just now?"


def test_a_run_worker_is_not_given_up_because_the_clock_was_set() -> None:
    """psutil tells starts by the boot time, which moves with the clock or does not: a worker may seem to have started after its run."""
    worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60.0,), daemon=True)
    worker.start()
    try:
        assert worker.pid is not None
        assert is_alive(worker.pid, time.time()) and is_alive(worker.pid, time.time() - HOUR_S)
    finally:
        worker.kill()
        worker.join()
    assert not is_alive(worker.pid, time.time())
