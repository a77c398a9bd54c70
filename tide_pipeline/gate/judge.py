"""Numbers in, verdict out. Pure: knows no files, no engine and no clock.

    offline       acceptance on held-out prompts of the drifted workload rises for sure, and no other workload loses
    benchmark     the challenger is not slower than the champion (or, without one, than no speculation)
    equivalence   greedy output is the target's own
A number that is missing or NaN opens no door. An engine that only replicas run (TensorRT-LLM) is judged by `judge_acceptance`: the door
"benchmark" then stands open for the canary alone, which must time the draft before it goes any wider (rollout/bake.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from tide_pipeline.config import GateSettings
from tide_pipeline.contracts import BenchmarkReport, EngineBuild, GateVerdict, PairedAcceptance

DOORS = ("offline", "benchmark", "equivalence")
BENCHED = ("embedded",)            # backends whose engine the gate's own process runs
ON_CANARY = {
    "benchmark": {"passed": True, "measured_on": "canary",
                  "reason": "timed on the canary: the gate can't run this engine, so live traffic is, beside the draft it replaces"},
    "equivalence": {"passed": True, "measured_on": "nowhere",
                    "reason": "not measured: this engine's own verification decides which tokens are emitted"}}
ELSEWHERE = {"canary": "on the canary", "nowhere": "not asked"}        # what people read of a door that was not asked here
Door = dict[str, Any]

Z_95 = 1.96


def judge(*, paired: PairedAcceptance, champion: BenchmarkReport | None, challenger: BenchmarkReport, settings: GateSettings,
          challenger_digest: str, workload: str = "") -> GateVerdict:
    """`workload` is the drifted one; it is judged by `paired` itself, every other entry of `paired.by_workload` against its loss."""
    doors = {"offline": offline_door(paired, settings, workload), "benchmark": benchmark_door(champion, challenger, settings),
             "equivalence": equivalence_door(challenger)}
    return _verdict(doors, champion, challenger, challenger_digest)


def judge_acceptance(*, paired: PairedAcceptance, champion: EngineBuild | None, challenger: EngineBuild, settings: GateSettings,
                     workload: str = "") -> GateVerdict:
    """As `judge`, of a build that the gate's process can't run: acceptance decides, the canary is left the rest."""
    doors = {"offline": offline_door(paired, settings, workload)} | {name: dict(door) for name, door in ON_CANARY.items()}
    return _verdict(doors, champion, challenger, challenger.draft_digest)


def _verdict(doors: dict[str, Door], champion: BenchmarkReport | EngineBuild | None, challenger: BenchmarkReport | EngineBuild,
             digest: str) -> GateVerdict:
    return GateVerdict(passed=all(door["passed"] for door in doors.values()), doors=doors,
                       champion=champion.draft_version if champion else "", challenger=challenger.draft_version, challenger_digest=digest)


def offline_door(paired: PairedAcceptance, settings: GateSettings, workload: str) -> Door:
    """The gain must reach `min_gain` and its interval's lower end `min_gain_low`: worth a swap, and no accident.

    How often it errs is simulated in tests/unit/test_gate_statistics.py. A workload with too few prompts to judge is only named.
    """
    judged, unjudged = {}, []
    for name, found in paired.by_workload.items():
        if name == workload:
            continue
        if found.get("prompts", 0.0) >= settings.min_prompts:
            judged[name] = found
        else:
            unjudged.append(name)
    losers = {name: found for name, found in judged.items() if _loses(found, settings.max_workload_loss)}
    unsure = [name for name, found in judged.items() if name not in losers and not _low(found) >= -settings.max_workload_loss]
    needed_low = min(settings.min_gain_low, settings.min_gain)
    enough, sure, gained = paired.prompts >= settings.min_prompts, paired.gain_low >= needed_low, paired.gain >= settings.min_gain
    door = {"passed": enough and gained and sure and not losers, "reason": "", **_numbers(paired), "min_gain": settings.min_gain,
            "min_gain_low": needed_low, "worst_other_gain": min((found.get("gain", math.nan) for found in judged.values()),
                                                                          default=0.0),
            "unjudged_workloads": unjudged, "unsure_workloads": unsure}
    focus = paired.by_workload.get(workload, {})
    door |= {key: focus[key] for key in ("champion_first_position", "challenger_first_position") if key in focus}
    if not enough:
        door["reason"] = f"{paired.prompts} held-out prompts, at least {settings.min_prompts} are needed: capture more traffic"
    elif losers:
        lost = ", ".join(f"{name} {_interval(found)}" for name, found in losers.items())
        door["reason"] = f"acceptance length falls on other workloads, where at most {settings.max_workload_loss:.2f} may be lost: {lost}"
    else:
        short = [f"its lower end is below {needed_low:.2f}"] if not sure else []
        short += [f"the gain is below {settings.min_gain:.2f}"] if not gained else []
        unknown = f"; not certain to lose less than {settings.max_workload_loss:.2f}: {', '.join(unsure)}" if unsure else ""
        door["reason"] = (f"acceptance length {paired.champion:.2f} to {paired.challenger:.2f}, gain "
                          f"{_interval(dataclasses.asdict(paired))} over {paired.prompts} prompts, "
                          f"{' and '.join(short) or f'at least {settings.min_gain:.2f}'}{unknown}")
    return door


def _loses(found: Mapping[str, float], allowed: float) -> bool:
    """More than allowed by its estimate, or for certain more than half of that; a figure that is missing loses."""
    gain, high = found.get("gain", math.nan), found.get("gain_high", math.inf)
    return not gain >= -allowed or (high < 0 and gain < -allowed / 2)


def _low(found: Mapping[str, float]) -> float:
    return found.get("gain_low", found.get("gain", math.nan))


def _interval(found: Mapping[str, float]) -> str:
    ends = f" [{found['gain_low']:+.2f}, {found['gain_high']:+.2f}]" if "gain_low" in found and "gain_high" in found else ""
    return f"{found.get('gain', math.nan):+.2f}{ends}"


def benchmark_door(champion: BenchmarkReport | None, challenger: BenchmarkReport, settings: GateSettings) -> Door:
    """Raw tokens/s are not compared: both were timed prompt by prompt, next to each other and to plain decoding.

    On a shared machine timings scatter: only a challenger whose whole interval lies below `min_speedup_ratio` is refused.
    """
    ratio, low, high = speed_ratio(champion, challenger)
    needed = max(1, settings.bench_prompts // 2)
    enough = challenger.prompts >= needed
    fast = math.isfinite(low) and high >= settings.min_speedup_ratio
    against = "champion" if champion else "no speculation"
    baseline = champion.tokens_per_s if champion else challenger.plain_tokens_per_s
    if not enough:
        reason = f"{challenger.prompts} prompts were timed, at least {needed} are needed: capture more traffic"
    else:
        reason = (f"{challenger.speedup:.2f}x plain decoding against {champion.speedup if champion else 1.0:.2f}x with {against}, ratio "
                  f"{ratio:.2f} [{low:.2f}, {high:.2f}], {'not below' if fast else 'below'} {settings.min_speedup_ratio:.2f} "
                  f"({challenger.tokens_per_s:.0f} and {baseline:.0f} tokens/s)")
    return {"passed": bool(enough and fast), "reason": reason, "against": against, "ratio": ratio, "ratio_low": low, "ratio_high": high,
            "champion_tokens_per_s": baseline, "challenger_tokens_per_s": challenger.tokens_per_s,
            "plain_tokens_per_s": challenger.plain_tokens_per_s, "champion_speedup": champion.speedup if champion else 1.0,
            "challenger_speedup": challenger.speedup, "prompts": challenger.prompts}


def equivalence_door(challenger: BenchmarkReport) -> Door:
    """Every compared token is the argmax of a plain pass, or tied with it."""
    compared, wrong = challenger.compared_tokens, challenger.mismatches
    if compared <= 0:
        reason = "no greedy output was compared with plain decoding: run the benchmark at temperature 0"
    else:
        reason = f"{wrong} of {compared} greedy tokens differ from plain decoding, {challenger.ties} ties"
    return {"passed": compared > 0 and wrong == 0, "reason": reason, "compared_tokens": compared, "ties": challenger.ties,
            "mismatches": wrong}


def speed_ratio(champion: BenchmarkReport | None, challenger: BenchmarkReport) -> tuple[float, float, float]:
    """Challenger's speed over the champion's with its 95 % interval.

    As it was timed, prompt by prompt; where it was not, from two speed-ups with independent errors, added on the log scale.
    """
    if champion is not None and any(challenger.over_champion):
        ratio, low, high = challenger.over_champion
        is_whole = 0.0 < low <= ratio <= high < math.inf and math.isfinite(_log_speedup(challenger)[0])
        return (ratio, low, high) if is_whole else (math.nan, math.nan, math.nan)
    (a, a_sd), (b, b_sd) = (_log_speedup(report) for report in (champion, challenger))
    ratio, width = b - a, Z_95 * math.hypot(a_sd, b_sd)
    return _exp(ratio), _exp(ratio - width), _exp(ratio + width)


def _log_speedup(report: BenchmarkReport | None) -> tuple[float, float]:
    """Logarithm and its standard deviation; NaN for a figure that can't be one."""
    if report is None:
        return 0.0, 0.0
    if not 0.0 < report.speedup_low <= report.speedup <= report.speedup_high < math.inf:
        return math.nan, math.nan
    return math.log(report.speedup), (math.log(report.speedup_high) - math.log(report.speedup_low)) / (2 * Z_95)


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0)) if math.isfinite(value) else math.nan


def _numbers(paired: PairedAcceptance) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(paired).items() if key != "by_workload"}
