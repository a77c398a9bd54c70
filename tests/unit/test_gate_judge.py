"""The verdict, door by door, and what must hold for any numbers."""

from __future__ import annotations

import dataclasses
import json
import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from tide_pipeline.config import GateSettings
from tide_pipeline.contracts import BenchmarkReport, GateVerdict, PairedAcceptance, from_dict
from tide_pipeline.gate.judge import DOORS, benchmark_door, equivalence_door, judge, offline_door, speed_ratio

SETTINGS = GateSettings()
GOOD = PairedAcceptance(1.8, 3.0, 1.2, 0.9, 1.5, 20, 4_000, {"de": {"gain": 1.2, "prompts": 20, "champion_first_position": 0.4}})


def bench(speedup: float = 1.5, width: float = 0.1, **over: object) -> BenchmarkReport:
    report = BenchmarkReport("b", "v2", 3.0, 125 * speedup, 125.0, speedup, speedup - width, speedup + width, 20.0, 8, 400, 1, 0)
    return dataclasses.replace(report, **over)  # type: ignore[arg-type]


def verdict(paired: PairedAcceptance = GOOD, champion: BenchmarkReport | None = None,
            challenger: BenchmarkReport | None = None) -> GateVerdict:
    return judge(paired=paired, champion=champion, challenger=challenger or bench(), settings=SETTINGS, challenger_digest="d" * 64,
                 workload="de")


def test_a_better_draft_passes_every_door() -> None:
    found = verdict(champion=bench(1.1, draft_version="v1"))
    assert found.passed and set(found.doors) == set(DOORS) and (found.champion, found.challenger) == ("v1", "v2")
    assert "gain +1.20" in found.reasons and "0 of 400" in found.reasons
    assert found.doors["offline"]["champion_first_position"] == 0.4
    assert from_dict(GateVerdict, json.loads(json.dumps(dataclasses.asdict(found)))) == found


@pytest.mark.parametrize(("change", "says"), [
    ({"gain_low": -0.001}, "lower end is below 0.00"),
    ({"gain_low": math.nan}, "lower end is below"),
    ({"gain": 0.04, "gain_low": 0.03}, "the gain is below 0.05"),
    ({"gain": math.nan}, "the gain is below 0.05"),
    ({"prompts": 7}, "7 held-out prompts, at least 8"),
])
def test_a_gain_that_is_not_certain_is_refused(change: dict[str, float], says: str) -> None:
    door = offline_door(dataclasses.replace(GOOD, **change), SETTINGS, "de")  # type: ignore[arg-type]
    assert not door["passed"] and says in door["reason"]


def test_no_other_workload_may_lose() -> None:
    def with_py(gain: float, prompts: int = 12) -> PairedAcceptance:
        return dataclasses.replace(GOOD, by_workload={"py": {"gain": gain, "prompts": prompts}, "de": {"gain": -9.0, "prompts": 20}})

    lost = offline_door(with_py(-0.16), SETTINGS, "de")
    assert not lost["passed"] and "py -0.16" in lost["reason"] and lost["worst_other_gain"] == -0.16
    assert not offline_door(with_py(math.nan), SETTINGS, "de")["passed"]
    assert offline_door(with_py(-0.14), SETTINGS, "de")["passed"]
    few = offline_door(with_py(-0.9, prompts=7), SETTINGS, "de")
    assert few["passed"] and few["unjudged_workloads"] == ["py"]


def test_a_workload_that_surely_loses_may_lose_half_as_much() -> None:
    def door(low: float, gain: float, high: float) -> dict[str, object]:
        py = {"gain": gain, "gain_low": low, "gain_high": high, "prompts": 40.0}
        return offline_door(dataclasses.replace(GOOD, by_workload={"py": py}), SETTINGS, "de")

    assert not door(-0.14, -0.10, -0.06)["passed"] and "py -0.10 [-0.14, -0.06]" in str(door(-0.14, -0.10, -0.06)["reason"])
    assert door(-0.14, -0.10, 0.01)["passed"] and door(-0.09, -0.05, -0.01)["passed"]
    unsure = door(-0.40, -0.10, 0.20)
    assert unsure["passed"] and unsure["unsure_workloads"] == ["py"] and "not certain to lose less than 0.15: py" in str(unsure["reason"])


def test_a_gate_that_allows_a_loss_asks_for_no_certain_gain() -> None:
    loose = dataclasses.replace(SETTINGS, min_gain=-0.5)
    lost = dataclasses.replace(GOOD, gain=-0.2, gain_low=-0.4)
    assert offline_door(lost, loose, "de")["passed"] and not offline_door(lost, SETTINGS, "de")["passed"]


def test_slower_within_the_noise_passes_and_slower_beyond_it_does_not() -> None:
    champion = bench(1.5, 0.1)
    assert benchmark_door(champion, bench(1.45, 0.1), SETTINGS)["passed"]
    refused = benchmark_door(champion, bench(1.2, 0.1), SETTINGS)
    assert not refused["passed"] and "below 1.00" in refused["reason"]


def test_without_a_champion_it_must_beat_no_speculation() -> None:
    assert not benchmark_door(None, bench(0.9, 0.05), SETTINGS)["passed"]
    door = benchmark_door(None, bench(0.97, 0.05), SETTINGS)
    assert door["passed"] and door["against"] == "no speculation" and door["champion_tokens_per_s"] == 125.0


@pytest.mark.parametrize("broken", [{"speedup": math.nan}, {"speedup_low": 0.0}, {"speedup_high": math.inf}, {"speedup_low": 9.0},
                                    {"prompts": 3}, {"over_champion": (1.5, math.nan, 1.6)}, {"over_champion": (1.5, 0.0, 1.6)}])
def test_a_benchmark_without_figures_opens_nothing(broken: dict[str, float]) -> None:
    assert not benchmark_door(bench(), bench(**broken), SETTINGS)["passed"]
    if "over_champion" not in broken:
        assert not benchmark_door(bench(), bench(**broken, over_champion=(1.5, 1.4, 1.6)), SETTINGS)["passed"]


def test_what_was_timed_prompt_by_prompt_decides() -> None:
    """Both speed-ups are the same within a wide noise; beside each other the challenger is slower on every prompt."""
    slower = benchmark_door(bench(1.5, 0.4), bench(1.45, 0.4, over_champion=(0.95, 0.93, 0.97)), SETTINGS)
    assert not slower["passed"] and (slower["ratio"], slower["ratio_low"], slower["ratio_high"]) == (0.95, 0.93, 0.97)
    assert benchmark_door(bench(1.5, 0.4), bench(1.45, 0.4), SETTINGS)["passed"]
    assert benchmark_door(None, bench(1.5, over_champion=(0.5, 0.4, 0.6)), SETTINGS)["passed"], "there is none to be slower than"


def test_one_wrong_token_closes_the_gate() -> None:
    assert not verdict(challenger=bench(mismatches=1)).passed
    assert not equivalence_door(bench(compared_tokens=0))["passed"], "nothing compared is nothing shown"
    assert equivalence_door(bench(ties=7))["passed"]


speeds = st.floats(0.05, 20.0)
spreads = st.floats(0.01, 0.9)


@given(speeds, spreads, speeds, spreads)
def test_the_interval_holds_the_ratio_and_mirrors(a: float, a_spread: float, b: float, b_spread: float) -> None:
    one, two = (bench(s, 0.0, speedup_low=s * (1 - spread), speedup_high=s * (1 + spread)) for s, spread in ((a, a_spread), (b, b_spread)))
    ratio, low, high = speed_ratio(one, two)
    assert low <= ratio <= high and math.isclose(ratio, b / a, rel_tol=1e-9)
    back, back_low, back_high = speed_ratio(two, one)
    assert math.isclose(ratio * back, 1, rel_tol=1e-9) and math.isclose(low * back_high, 1, rel_tol=1e-9) and back_low <= back


@given(speeds, spreads, speeds, st.floats(1.0, 3.0))
def test_a_faster_challenger_never_does_worse(champion: float, spread: float, challenger: float, factor: float) -> None:
    def report(speed: float) -> BenchmarkReport:
        return bench(speed, 0.0, speedup_low=speed * (1 - spread), speedup_high=speed * (1 + spread))

    if benchmark_door(report(champion), report(challenger), SETTINGS)["passed"]:
        assert benchmark_door(report(champion), report(challenger * factor), SETTINGS)["passed"]


anything = st.one_of(st.floats(), st.just(math.nan))


@given(anything, anything, st.integers(0, 50), anything, anything, st.integers(0, 20), st.integers(0, 3))
def test_a_verdict_is_its_doors(gain_low: float, other: float, prompts: int, speedup: float, low: float, timed: int, wrong: int) -> None:
    paired = dataclasses.replace(GOOD, gain_low=gain_low, prompts=prompts, by_workload={"py": {"gain": other, "prompts": 9}})
    found = verdict(paired, bench(), bench(speedup, 0.0, speedup_low=low, prompts=timed, mismatches=wrong))
    assert found.passed == all(door["passed"] for door in found.doors.values())
    assert all(isinstance(door["passed"], bool) and door["reason"] for door in found.doors.values())
    if found.passed:
        assert gain_low >= SETTINGS.min_gain_low and prompts >= 8 and other >= -SETTINGS.max_workload_loss and timed >= 4 and not wrong
        assert low <= speedup
