"""Alternating blocks in one process, and ratios of their speeds. Knows no engine.

    round 0   A B        one block of each, at most 2 s long, doing the same work
    round 1   B A        reversed, so that a machine that slows down or speeds up favours neither
    round 2   A B        ... with three or more: A B C, then C B A

A ratio is taken within a round, between neighbours in time; of at least 30 rounds the median counts, with the bootstrap 95 %
interval over rounds. The ratio of thread CPU time stands beside it: what other processes take from the wall clock is not in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from machine import median_interval
from numpy.typing import NDArray

LONGEST_BLOCK_S = 2.0
FEWEST_PAIRS = 30
RESAMPLES = 1_000

Work = Callable[[int], int]                    # number of the round -> units of work done, such as tokens
Clock = Callable[[], tuple[float, float]]      # wall and thread CPU time [s]


@dataclass(frozen=True, slots=True)
class Block:
    """One timed piece of work."""

    wall_s: float
    cpu_s: float
    units: int


def clock() -> tuple[float, float]:
    return time.perf_counter(), time.thread_time()


def order(names: Sequence[str], round_: int) -> list[str]:
    """Forwards in even rounds, backwards in odd ones."""
    return list(names) if round_ % 2 == 0 else list(reversed(names))


def alternate(works: Mapping[str, Work], rounds: int, *, start: int = 0, before: Callable[[str, int], None] | None = None,
              now: Clock = clock) -> dict[str, list[Block]]:
    """Time every work once a round, on this thread; `before` runs ahead of each block and is not timed."""
    blocks: dict[str, list[Block]] = {name: [] for name in works}
    for round_ in range(start, start + rounds):
        for name in order(list(works), round_):
            if before is not None:
                before(name, round_)
            wall, cpu = now()
            units = works[name](round_)
            wall_end, cpu_end = now()
            blocks[name].append(Block(wall_end - wall, cpu_end - cpu, units))
    return blocks


def ratio(a: Sequence[Block], b: Sequence[Block], seed: int = 0) -> dict[str, Any]:
    """How many times as fast `a` is as `b`, by wall clock and by thread CPU time; above 1, `a` is faster."""
    wall, cpu = speed_ratios(a, b, "wall_s"), speed_ratios(a, b, "cpu_s")
    longest_s = max(block.wall_s for block in (*a, *b))
    return {"wall": median_interval(wall.tolist(), seed), "cpu": median_interval(cpu.tolist(), seed),
            "longest_block_s": round(longest_s, 3), "within_rules": len(a) >= FEWEST_PAIRS and longest_s <= LONGEST_BLOCK_S}


def speed_ratios(a: Sequence[Block], b: Sequence[Block], clock_name: str) -> NDArray[np.float64]:
    """Units per second of `a` over those of `b`, one figure a round."""
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} and {len(b)} blocks make no pairs: time both in every round")
    return _rates(a, clock_name) / _rates(b, clock_name)


def median_rate(blocks: Sequence[Block]) -> float:
    """Units per second of wall clock."""
    return round(float(np.median(_rates(blocks, "wall_s"))), 2)


def quantile_ratio(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], q: float, seed: int = 0) -> dict[str, float]:
    """Quantile `q` of all values of `a` over that of `b`; a row per round, and rounds are what is resampled."""
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} and {len(b)} rows make no pairs: measure both in every round")

    def quantile(rows: Sequence[Sequence[float]], rounds: Sequence[int]) -> float:
        return float(np.quantile(np.concatenate([rows[i] for i in rounds]), q))

    def at(rounds: Sequence[int]) -> float:
        return quantile(a, rounds) / quantile(b, rounds)

    draws = np.random.default_rng(seed).integers(0, len(a), (RESAMPLES, len(a)))
    resampled = [at(draw.tolist()) for draw in draws]
    return {"ratio": round(at(range(len(a))), 4), "low": round(float(np.quantile(resampled, 0.025)), 4),
            "high": round(float(np.quantile(resampled, 0.975)), 4), "n": len(a)}


def _rates(blocks: Sequence[Block], clock_name: str) -> NDArray[np.float64]:
    if idle := [i for i, block in enumerate(blocks) if block.units <= 0 or getattr(block, clock_name) <= 0]:
        raise ValueError(f"block {idle[0]} did no work or took no time: make the blocks longer")
    return np.array([block.units / getattr(block, clock_name) for block in blocks])
