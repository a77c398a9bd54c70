"""The statistics of benchmarks/abba.py, on made-up times: nothing here is timed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from abba import Block, alternate, median_rate, order, quantile_ratio, ratio, speed_ratios


def blocks(seconds: list[float], units: int = 100, cpu: list[float] | None = None) -> list[Block]:
    return [Block(wall, of_cpu, units) for wall, of_cpu in zip(seconds, cpu or seconds, strict=True)]


def test_rounds_run_forwards_and_backwards_in_turn() -> None:
    ran: list[tuple[str, int]] = []
    prepared: list[tuple[str, int]] = []

    def work(name: str, units: int) -> object:
        def run(round_: int) -> int:
            assert prepared[-1] == (name, round_), "each block is prepared just before it"
            ran.append((name, round_))
            return units

        return run

    ticks = iter(range(1_000))
    timed = alternate({"a": work("a", 5), "b": work("b", 7), "c": work("c", 9)}, 3, start=4,  # type: ignore[dict-item]
                      before=lambda name, round_: prepared.append((name, round_)), now=lambda: (2.0 * next(ticks), 0.5))
    assert ran == [("a", 4), ("b", 4), ("c", 4), ("c", 5), ("b", 5), ("a", 5), ("a", 6), ("b", 6), ("c", 6)]
    assert timed == {"a": [Block(2.0, 0.0, 5)] * 3, "b": [Block(2.0, 0.0, 7)] * 3, "c": [Block(2.0, 0.0, 9)] * 3}
    assert order("ab", 0) + order("ab", 1) == ["a", "b", "b", "a"]


def test_preparation_is_not_timed() -> None:
    seconds = [0.0]

    def spend(amount: float) -> int:
        seconds[0] += amount
        return 1

    timed = alternate({"a": lambda _: spend(2.0)}, 2, before=lambda *_: bool(spend(50.0)), now=lambda: (seconds[0], seconds[0]))  # type: ignore[arg-type, return-value]
    assert [block.wall_s for block in timed["a"]] == [2.0, 2.0]


def test_a_ratio_compares_rates_not_times() -> None:
    twice = ratio(blocks([1.0] * 30, units=200), blocks([1.0] * 30, units=100))
    assert twice["wall"] == {"median": 2.0, "low": 2.0, "high": 2.0, "n": 30}
    half_the_time = ratio(blocks([0.5] * 30), blocks([1.0] * 30, cpu=[0.4] * 30))
    assert half_the_time["wall"]["median"] == 2.0 and half_the_time["cpu"]["median"] == 0.8


def test_one_disturbed_block_does_not_move_the_median() -> None:
    disturbed = [1.0] * 31
    disturbed[7] = 40.0
    assert ratio(blocks(disturbed), blocks([1.1] * 31))["wall"]["median"] == 1.1


def test_a_drifting_machine_favours_neither_side() -> None:
    """Every block takes longer than the one before; both sides do the same work."""
    clock = iter(np.cumsum(np.linspace(1.0, 2.0, 4 * 40)).tolist())

    def now() -> tuple[float, float]:
        at = next(clock)
        return at, at

    timed = alternate({"a": lambda _: 1, "b": lambda _: 1}, 40, now=now)
    by_round = speed_ratios(timed["a"], timed["b"], "wall_s")
    assert (by_round[::2] > 1).all() and (by_round[1::2] < 1).all(), "within a round the first one wins"
    assert ratio(timed["a"], timed["b"])["wall"]["median"] == pytest.approx(1.0, abs=0.002)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)

    def noisy(mean: float) -> list[Block]:
        return blocks((mean * rng.lognormal(0.0, 0.1, 40)).tolist())

    trials = [ratio(noisy(1.0), noisy(1.2), seed=trial)["wall"] for trial in range(200)]
    held = sum(t["low"] <= 1.2 <= t["high"] for t in trials)
    assert 180 <= held <= 199, held
    assert all(t["low"] <= t["median"] <= t["high"] for t in trials)


def test_results_repeat_with_a_seed() -> None:
    rng = np.random.default_rng(2)
    a, b = blocks(rng.uniform(1, 2, 30).tolist()), blocks(rng.uniform(1, 2, 30).tolist())
    assert ratio(a, b, seed=3) == ratio(a, b, seed=3)


@pytest.mark.parametrize(("seconds", "pairs", "sound"), [(1.0, 30, True), (2.5, 30, False), (1.0, 29, False)])
def test_a_ratio_says_whether_it_kept_the_rules(seconds: float, pairs: int, sound: bool) -> None:
    assert ratio(blocks([1.0] * pairs), blocks([seconds] * pairs))["within_rules"] is sound


def test_what_makes_no_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match="3 and 2 blocks make no pairs"):
        ratio(blocks([1.0] * 3), blocks([1.0] * 2))
    with pytest.raises(ValueError, match="make no pairs"):
        ratio([], [])
    with pytest.raises(ValueError, match="block 1 did no work"):
        ratio(blocks([1.0, 1.0]), [Block(1.0, 1.0, 5), Block(1.0, 1.0, 0)])
    with pytest.raises(ValueError, match="make no pairs"):
        quantile_ratio([[1.0]], [], 0.99)


def test_median_rate_is_units_per_second() -> None:
    assert median_rate([Block(2.0, 1.0, 100), Block(1.0, 1.0, 100), Block(4.0, 1.0, 100)]) == 50.0


@pytest.fixture
def gaps() -> Iterator[list[list[float]]]:
    rng = np.random.default_rng(4)
    yield [rng.exponential(10.0, 300).tolist() for _ in range(32)]


def test_a_quantile_is_of_all_values_together(gaps: list[list[float]]) -> None:
    slower = [[1.1 * gap for gap in row] for row in gaps]
    told = quantile_ratio(slower, gaps, 0.99)
    assert told == {"ratio": 1.1, "low": 1.1, "high": 1.1, "n": 32}
    rare = [[*row, 1e4] if i == 0 else row for i, row in enumerate(gaps)]
    assert quantile_ratio(rare, gaps, 0.99)["ratio"] == pytest.approx(1.0, abs=0.01)


def test_a_quantile_of_independent_runs_has_an_interval_around_one(gaps: list[list[float]]) -> None:
    rng = np.random.default_rng(5)
    told = quantile_ratio([rng.exponential(10.0, 300).tolist() for _ in range(32)], gaps, 0.99)
    assert told["low"] < 1.0 < told["high"] and told["low"] <= told["ratio"] <= told["high"]
