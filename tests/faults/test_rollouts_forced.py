"""Drafts forced past the offline gate onto two real replicas under load, two rollouts at once, and a rollout whose canary is killed.

Nothing of this may cost an answer: the draft is refused or rolled back, and meanwhile the engine serves at least as fast as without any.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import inject
import pytest

from tests.fakes_rollout import judged
from tests.faults.converged import answers, assert_lake, look, serves_the_record
from tests.faults.load import Load
from tests.faults.loop import Loop, tiny_loop, until
from tests.helpers import random_draft, tiny_spec, write_tiny_build
from tests.serving import poison
from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import Deployment, EngineBuild
from tide_pipeline.deployment.builds import load_build, save_build
from tide_pipeline.errors import DeploymentConflict, GateNotPassed
from tide_pipeline.gate.judge import DOORS
from tide_pipeline.models.target import Target
from tide_pipeline.rollout.drive import Driver
from tide_pipeline.rollout.history import is_under_way
from tide_pipeline.rollout.promote import promote

pytestmark = [pytest.mark.faults, pytest.mark.filterwarnings("ignore::ResourceWarning")]

SETTINGS = {"serve": {"replicas": 2}, "rollout": {"max_drop": 0.15, "bake_s": 4.0, "max_bake_s": 40.0, "min_bake_steps": 60}}
SLOW_S = 20.0                      # stated: no longer than this below the level without speculation


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    with tiny_loop(tmp_path_factory.mktemp("forced"), SETTINGS, parts=("replica",)) as made:
        yield made


@pytest.fixture(scope="module")
def target(loop: Loop) -> Target:
    return Target(loop.config.engine_dir / "target", tiny_spec(max_context=256))


def build(loop: Loop, target: Target, version: str, *, noise: float = 0.5, seed: int = 0, is_random: bool = False) -> EngineBuild:
    """A build in its place; `is_random`: whole, well-formed, and good for nothing."""
    made = write_tiny_build(loop.config.state.builds / f"new-{version}", target, random_draft(target, seed=seed) if is_random else None,
                            version=version, noise=noise, seed=seed)
    folder = loop.config.state.builds / loop.config.target / made.build_id
    Path(made.path).rename(folder)
    save_build(replace(made, path=str(folder)))
    return replace(made, path=str(folder))


def force(config: TideConfig, made: EngineBuild, who: str = "test") -> Deployment:
    """Promote with a verdict that claims that every door was open."""
    doors = {name: {"passed": True, "reason": "forced past the gate"} for name in DOORS}
    return promote(config, made, judged(config, made, doors=doors), who=who, reason="a fault")


def _seconds(since: float, until_: float) -> list[float]:
    return [since + i for i in range(int(until_ - since))]


@pytest.mark.parametrize("kind", ["nan", "random"])
def test_a_poisoned_draft_never_leaves_its_canary(loop: Loop, target: Target, kind: str) -> None:
    """NaN in whole weights is refused when they are loaded; random weights are, by live traffic."""
    before, rest = look(loop), loop.latest().groups["rest"]
    made = build(loop, target, f"v-{kind}", is_random=kind == "random", seed=11)
    if kind == "nan":
        poison(made)
        made = load_build(loop.config.state.builds, loop.config.target, made.build_id)
    with Load(loop.client, speculation="off", name=f"plain-{kind}") as plain:
        until(lambda: len(plain.answered) >= 4)
        time.sleep(6.0)
    tokens_off = len(plain.answered) * 48 / (max(at for _, at in plain.answered) - min(sent for sent, _ in plain.answered))
    with Load(loop.client, name=kind) as load:
        until(lambda: len(load.answered) >= 10)
        forced_at, n = time.monotonic(), loop.latest().n
        end = force(loop.config, made)
        back_s = time.monotonic() - forced_at
        until(lambda: serves_the_record(loop))
        answered, healed_at = len(load.answered), time.monotonic()
        until(lambda: len(load.answered) >= answered + 10)
    assert end.stage == "rolled_back" and end.groups["rest"] == rest, end.reason
    assert all(len(d.canary_replicas) <= 1 for d in loop.record.history() if d.n > n), "it left its canary"
    assert not load.failures
    load.assert_same_answers()
    slow_s = below(load, forced_at, healed_at, 0.8 * tokens_off)
    print(f"FAULT {kind} draft: back after {back_s:.1f} s ({end.reason[-160:]}); without speculation {tokens_off:.0f} tokens/s, "
          f"below 0.8 of it for {slow_s:.0f} s at most")
    assert slow_s <= SLOW_S
    assert_lake(loop, before)


def below(load: Load, since: float, until_: float, level: float) -> float:
    """The longest stretch of seconds in which answers came slower than `level` tokens per second, over 3 s at a time."""
    longest = stretch = 0.0
    for second in _seconds(since, until_ - 3):
        tokens = sum(48 * max(0.0, min(ended, second + 3) - max(sent, second)) / (ended - sent) for sent, ended in load.answered)
        stretch = stretch + 1 if tokens / 3 < level else 0.0
        longest = max(longest, stretch)
    return longest


def test_bytes_that_changed_after_the_gate_open_no_door(loop: Loop, target: Target) -> None:
    made, n = build(loop, target, "v-altered", seed=12), loop.latest().n
    weights = Path(made.path) / "draft" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(GateNotPassed, match="altered"):
        force(loop.config, made)
    assert loop.latest().n == n


def test_of_two_rollouts_at_once_one_happens(loop: Loop, target: Target) -> None:
    """Three drivers, two drafts: the same draft twice is one rollout, the other draft is told to wait."""
    before, n = look(loop), loop.latest().n
    one, other = build(loop, target, "v-one", noise=0.4, seed=13), build(loop, target, "v-other", noise=0.4, seed=14)
    with Load(loop.client, name="two") as load, ThreadPoolExecutor(3) as pool:
        until(lambda: len(load.answered) >= 10)
        began = time.monotonic()
        tries = [(made, pool.submit(force, loop.config, made, f"driver {i}")) for i, made in enumerate((one, other, one))]
        ends = [(made, _end(future)) for made, future in tries]
    done = [(made, end) for made, end in ends if isinstance(end, Deployment)]
    assert done and len({made.build_id for made, _ in done}) == 1 and len({end.n for _, end in done}) == 1, ends
    assert all(isinstance(end, Deployment | DeploymentConflict) for _, end in ends), ends
    assert len([d for d in loop.record.history() if d.n > n and d.stage == "stable"]) == 1
    assert not load.failures
    until(lambda: serves_the_record(loop))
    print(f"FAULT two rollouts at once: one of them settled after {time.monotonic() - began:.1f} s")
    assert_lake(loop, before)


def _end(future: Future[Deployment]) -> Deployment | Exception:
    try:
        return future.result(180)
    except Exception as error:
        return error


def _drive(config: TideConfig, made: EngineBuild) -> None:
    force(config, made, "a driver that dies")


def test_a_canary_and_its_driver_are_killed(loop: Loop, target: Target) -> None:
    """Whoever looks next (Dagster's sensor; here the test) ends the rollout, forward or back, and every replica serves the record."""
    before, made = look(loop), build(loop, target, "v-orphan", noise=0.4, seed=15)
    with Load(loop.client, name="orphan") as load:
        until(lambda: len(load.answered) >= 10)
        driver = multiprocessing.get_context("spawn").Process(target=_drive, args=(loop.config, made))
        driver.start()
        until(lambda: is_under_way(loop.latest()), "the rollout did not begin")
        assert driver.pid is not None
        os.kill(driver.pid, signal.SIGKILL)
        driver.join()
        canary = loop.latest().canary_replicas[0]
        engines = inject.processes(loop.id, "engine")
        chosen = next(p for p in engines if any(f"/{canary}/" in word for word in p.cmdline()))
        chosen.kill()
        killed_at = time.monotonic()
        until(lambda: not is_under_way(Driver(loop.config, "somebody else").advance().deployment), "nobody can end it")
        ended_s = time.monotonic() - killed_at
        until(lambda: serves_the_record(loop))
        until(lambda: answers(loop))
    print(f"FAULT canary and driver killed: {loop.latest().stage} after {ended_s:.1f} s, all replicas right after "
          f"{time.monotonic() - killed_at:.1f} s, {load.broken(killed_at + 1.0)} requests broke off before and after")
    assert load.broken(killed_at + 1.0)[1] == 0, load.failures
    load.assert_same_answers()
    assert_lake(loop, before)
