"""Time per token where it decides, simulated: stretches that scatter by 0.3 (log) and are like the one before them (correlation 0.5).

The machine's own ups and downs are shared by replicas that answer side by side. Nothing of it was measured on a GPU.
"""

from __future__ import annotations

import functools
import math
import random

import pytest

from tests.fakes_rollout import slowdown, slowdown_since
from tide_pipeline.config import RolloutSettings
from tide_pipeline.rollout.bake import Decision, Evidence, judge_bake
from tide_pipeline.rollout.live import Rate
from tide_pipeline.rollout.rows import LiveRow

SCATTER, LIKE, SHARED = 0.3, 0.5, 0.3
STRETCHES, PAST, ROLLOUTS = 30, 60, 60           # of 2 s: a bake of a minute, and two minutes before it
ACCEPTED = Rate(0.6, 0.02, 1000, 100)            # with both drafts
SETTINGS = RolloutSettings()                     # max_slowdown 0.25


def course(rng: random.Random, n: int, scatter: float, like: float) -> list[float]:
    values = [rng.gauss(0, scatter)]
    while len(values) < n:
        values.append(like * values[-1] + math.sqrt(1 - like**2) * rng.gauss(0, scatter))
    return values


def rows(at: float, logs: list[float]) -> list[LiveRow]:
    return [LiveRow(at + 2.0 * i, f"r{i}", "de", "a", "v", 10, 5, 10, 200 * math.exp(log)) for i, log in enumerate(logs)]


def rollout(is_alone: bool, seed: int, times: float) -> Decision:
    """How a bake ends that is looked at every three stretches; steps with the new draft take `times` as long."""
    rng, n = random.Random(seed), STRETCHES
    if is_alone:
        old = rows(0.0, course(rng, PAST, SCATTER, LIKE))
        new = rows(1000.0, [log + math.log(times) for log in course(rng, n, SCATTER, LIKE)])
    else:
        machine, own, others = course(rng, n, SHARED, 0.9), course(rng, n, SCATTER, LIKE), course(rng, n, SCATTER, LIKE)
        old = rows(0.0, [a + b for a, b in zip(machine, others, strict=True)])
        new = rows(0.0, [a + b + math.log(times) for a, b in zip(machine, own, strict=True)])
    for k in range(3, n + 1, 3):
        gap = slowdown_since(new[:k], old) if is_alone else slowdown(new[:k], old)
        found = judge_bake(Evidence(ACCEPTED, ACCEPTED, slower=gap), SETTINGS, time_is_up=k == n, must_time=True).decision
        if found is not Decision.OPEN:
            return found
    raise AssertionError("time always ends a bake")


@functools.cache
def sent_back(is_alone: bool, times: float) -> float:
    """Share of the rollouts."""
    return sum(rollout(is_alone, seed, times) is not Decision.FINE for seed in range(ROLLOUTS)) / ROLLOUTS


@pytest.mark.parametrize("is_alone", [False, True], ids=["beside a control", "alone"])
def test_as_fast_a_draft_stays_and_one_that_takes_twice_the_time_does_not(is_alone: bool) -> None:
    assert sent_back(is_alone, 1.0) <= 0.05
    assert sent_back(is_alone, 2.0) >= 0.85


def test_stretches_that_are_like_each_other_count_for_less() -> None:
    rng = random.Random(3)
    scattered = course(rng, 40, SCATTER, 0.0)
    apart = slowdown(rows(0.0, scattered), rows(0.0, [0.0] * 40))
    drifting = slowdown(rows(0.0, sorted(scattered)), rows(0.0, [0.0] * 40))
    assert apart is not None and drifting is not None and drifting.value == pytest.approx(apart.value)
    assert drifting.error > 2 * apart.error
