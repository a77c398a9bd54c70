"""What a soak came to: what became of every shift, where an adaptation's time went, which requests may be lost, which bars were missed.

Sums and rules; starts nothing. Times are Unix seconds.

    detect      first shifted request to the moment the sensor's verdict was "drifted"
    collect     from there until enough was captured: a run is asked for some seconds before that
    launch      from there to the run's first step          train, register, build, gate     its steps
    roll out    its last step, without the bake             bake        canary record to the next record
    between     what lies between its steps
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from soak_loop_faults import BACK_WITHIN_S, Injected
from soak_loop_plan import Bars, Shift
from soak_loop_traffic import Lost, Tally

from tide_pipeline.contracts import Deployment, DriftVerdict, GateVerdict
from tide_pipeline.rollout.history import CANARY, STABLE, began_of, is_under_way
from tide_pipeline.stack.runs import RunView

STEPS = {"draft_checkpoint": "train", "registered_draft": "register", "draft_engine": "build", "benchmark_report": "gate",
         "live_draft": "roll out"}
NOT_JUDGED = ("collect", "train", "bake")      # of an adaptation: the rest has a bar
SETTLES_S = 3.0                    # requests are refused until so long after a part is back


@dataclass
class Turn:
    """One part of the plan as it was played."""

    number: int
    shift: Shift
    began: float
    ended: float = 0.0
    verdicts: list[tuple[float, DriftVerdict]] = field(default_factory=list)
    sensor: str = ""               # its last words


@dataclass(frozen=True)
class Adaptation:
    """A Dagster run of adapt_draft with what lies in its folder."""

    run: RunView
    focus_since: float
    verdict: GateVerdict | None    # None: it did not come to the gate
    collected: float = 0.0         # when enough was captured, as the sensor saw it coming; 0: not known


def outcome(turn: Turn, adaptations: Sequence[Adaptation], history: Sequence[Deployment]) -> dict[str, Any]:
    """What became of a shift, in one word and one sentence."""
    here = [a for a in adaptations if turn.began <= a.run.created < turn.ended]
    ends = [d for a in here for d in rollouts_of(a.run, history) if not is_under_way(d)]
    refused = [a.verdict for a in here if a.verdict is not None and not a.verdict.passed]
    last = next((verdict for _, verdict in reversed(turn.verdicts)), None)
    if any(d.stage == STABLE for d in ends):
        word, why = "adapted", next(d.reason for d in reversed(ends) if d.stage == STABLE)
    elif refused:
        word, why = "judged not worth it", f"the gate refused: {refused[-1].reasons}"
    elif ends:
        word, why = "judged not worth it", f"rolled back: {ends[-1].reason}"
    elif last is not None and last.enough_data and not last.drifted:
        word, why = "judged not worth it", f"no drift: {last.reason}"
    else:
        word, why = "undecided", last.reason if last is not None else "no verdict"
    return {"turn": turn.number, "domain": turn.shift.domain, "recurring": turn.shift.recurring,
            "seconds": round(turn.ended - turn.began, 1), "outcome": word, "why": why, "runs": [a.run.status for a in here],
            "sensor_said": turn.sensor}


def rollouts_of(run: RunView, history: Sequence[Deployment]) -> list[Deployment]:
    """Records of the rollouts that a run began or drove; beside it the rollout sensor writes some of them."""
    begun = {began_of(d) for d in history if d.who == f"dagster run {run.run_id[:8]}"}
    return [d for d in history if began_of(d) in begun]


def stages(first_sent: float, adaptation: Adaptation, history: Sequence[Deployment], recent_s: float) -> dict[str, float]:
    """Seconds by stage of an adaptation that ended with a rollout; {} for another."""
    run = adaptation.run
    steps = {stage: run.steps[key] for key, stage in STEPS.items() if key in run.steps and run.steps[key].ended}
    mine = rollouts_of(run, history)
    if len(steps) < len(STEPS) or not any(d.stage == STABLE for d in mine):
        return {}
    seen = adaptation.focus_since + recent_s               # the episode's windows begin `recent_s` before the verdict
    canary = next((d for d in mine if d.stage == CANARY), None)
    after = next((d for d in mine if canary and d.n > canary.n and began_of(d) == began_of(canary)), None)
    bake = after.created_at - canary.created_at if canary and after else 0.0
    collected = min(adaptation.collected or run.created, steps["train"].started)
    found = {"detect": seen - first_sent, "collect": collected - seen, "launch": steps["train"].started - collected}
    found |= {stage: step.ended - step.started for stage, step in steps.items()}
    found["roll out"] -= bake
    found["bake"] = bake
    total = steps["roll out"].ended - first_sent
    found["between"] = total - sum(found.values())
    found["total"] = total
    found["everything else"] = total - sum(found[name] for name in NOT_JUDGED)
    return {name: round(seconds, 2) for name, seconds in found.items()}


def excused(lost: Lost, faults: Sequence[Injected]) -> str:
    """The part that was killed while it was serving this request; "" where there is none.

    A replica takes requests for a moment after its engine was killed, until its supervisor sees it: "(going down)".
    """
    serving = [f for f in faults if f.fault.is_serving]
    at_once = next((f.fault.name for f in serving if lost.sent_at <= f.at <= lost.ended_at), "")
    return at_once or next((f"{f.fault.name} (going down)" for f in serving
                            if f.fault.name != "front" and f.at <= lost.sent_at <= (f.back_at or f.at + BACK_WITHIN_S)), "")


def expected_refusal(lost: Lost, faults: Sequence[Injected]) -> bool:
    """Whether something that serves was down then."""
    return any(f.fault.is_serving and f.at - SETTLES_S <= lost.ended_at and lost.sent_at <= (f.back_at or lost.sent_at) + SETTLES_S
               for f in faults)


def requests(tally: Tally, faults: Sequence[Injected]) -> dict[str, Any]:
    """Every request accounted for."""
    reasons = [excused(lost, faults) for lost in tally.failed]
    unexpected = [lost for lost in tally.refused if not expected_refusal(lost, faults)]
    return {"finished": tally.finished, "tokens": tally.tokens, "failed": len(tally.failed),
            "failed_while_killed": {name: reasons.count(name) for name in sorted(set(reasons) - {""})},
            "failed_otherwise": reasons.count(""), "refused_and_sent_again": len(tally.refused),
            "refused_with_nothing_down": len(unexpected),
            "first_errors": [lost.error for lost, reason in zip(tally.failed, reasons, strict=True) if not reason][:5]
            + [lost.error for lost in unexpected][:5]}


def medians(adaptations: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds by stage over the adaptations without a fault in them."""
    clean = [a["stages_s"] for a in adaptations if not a["faults"]]
    return {stage: round(statistics.median(found[stage] for found in clean), 2) for stage in clean[0]} if clean else {}


def missed(result: Mapping[str, Any], bars: Bars) -> list[str]:
    """The bars that were missed, each with its figure."""
    asked, shifts, out = result["requests"], result["shifts"], []
    if len(shifts) < bars.shifts:
        out.append(f"{len(shifts)} of {bars.shifts} shifts were played")
    if result["seconds"] < bars.seconds:
        out.append(f"{result['seconds']:.0f} of {bars.seconds:.0f} s were played")
    out += [f"shift {s['turn']} to {s['domain']} is undecided: {s['why']}" for s in shifts if s["outcome"] == "undecided"]
    if asked["failed_otherwise"]:
        out.append(f"{asked['failed_otherwise']} requests failed that nothing killed was serving: {asked['first_errors'][:1]}")
    if asked["refused_with_nothing_down"]:
        out.append(f"{asked['refused_with_nothing_down']} requests were refused while nothing was down: {asked['first_errors'][-1:]}")
    out += [f"the memory of {name} is not bounded" for name in result["unbounded_memory"]]
    out += [f"the disk of {name} is not bounded" for name in result["unbounded_disk"]]
    out += [f"{f['role']} was not back" for f in result["faults"] if f["back_after_s"] is None]
    out += [f"{name} was never killed" for name in result["faults_left"]]
    slow = [a["stages_s"]["everything else"] for a in result["adaptations"] if not a["faults"]]
    if slow and max(slow) > bars.everything_else_s:
        out.append(f"all but collect, train and bake took {statistics.median(slow):.1f} s (median, at most {max(slow):.1f} s), "
                   f"not under {bars.everything_else_s:.0f} s")
    if len(slow) < bars.clean_adaptations:
        out.append("no adaptation without a fault in it was seen")
    return out
