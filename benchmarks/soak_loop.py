"""Does the loop hold up for an hour? The whole stack in mode auto, traffic that shifts between domains, parts killed all the while.

    python benchmarks/soak_loop.py --json benchmarks/results/soak_loop_2cores.json --report docs/soak/report.html      about 70 minutes
    python benchmarks/soak_loop.py --quick                                                        about 12 minutes, proves nothing

What is played is in soak_loop_plan.py, what counts as what in soak_loop_judge.py. Two cores: one serves, one trains.
Exit code 1: a bar was missed; the result's "missed" and the last lines name each.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from options import finish, parser, settle
from soak_loop_dagster import launch, seen, sensor_said
from soak_loop_faults import Faults
from soak_loop_judge import Turn, medians, missed, outcome, requests, stages
from soak_loop_plan import Plan, Shift, full, quick
from soak_loop_traffic import Traffic
from soak_loop_watch import Watch, disk, memory, over_time, unbounded

from tide_pipeline.config import TideConfig, override
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.drift.judge import judge_drift
from tide_pipeline.drift.series import acceptance_series
from tide_pipeline.recipes import load
from tide_pipeline.report.page import write_report
from tide_pipeline.report.period import collect
from tide_pipeline.serve.client import TritonClient
from tide_pipeline.stack.local import LocalStack
from tide_pipeline.stack.runs import RunView, runs_of
from tide_pipeline.workloads.prompts import domain_prompts

TICK_S = 1.0
LOOK_EVERY_S = 8.0                 # at runs and verdicts
LONGEST = 2.0                      # times its seconds: a shift ends then, settled or not
SERIES_S = 30.0
MAINTENANCE = ("compact_lake", "retain_lake", "tidy_builds")


@dataclass
class Soak:
    """One soak of a running stack. What fails while it looks is counted and gone on from."""

    config: TideConfig
    plan: Plan
    stack: LocalStack
    began: float = field(default_factory=time.time)
    turns: list[Turn] = field(default_factory=list)
    runs: dict[str, RunView] = field(default_factory=dict)
    errors: Counter[str] = field(default_factory=Counter)
    last_errors: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        prompts = {shift.domain: domain_prompts(self.config.engine_dir, shift.domain) for shift in self.plan.shifts}
        self.traffic = Traffic(TritonClient(self.stack.triton_url, self.config.target), prompts, self.plan.concurrency)
        self.faults = Faults(self.stack, list(self.plan.faults))
        self.watch = Watch(self.config.state, self.stack.record.stack_id, self.plan.sample_s)
        self.looked, self.maintained = 0.0, time.time()

    def play(self) -> None:
        """All turns, but none that would begin too late."""
        for number, shift in enumerate(self.plan.shifts):
            if time.time() - self.began > self.plan.most_s:
                break
            turn = Turn(number, shift, time.time())
            self.turns.append(turn)
            self.traffic.turn_to(number, shift.domain)
            self._say(f"{'back' if shift.recurring else 'on'} to {shift.domain}")
            while not self._is_over(turn, shift):
                with self._tolerant("faults"):
                    self.faults.tick(number, time.time() - turn.began)
                if time.time() - self.looked > LOOK_EVERY_S:
                    self._look(turn)
                if time.time() - self.maintained > self.plan.maintain_every_s:
                    self._maintain()
                time.sleep(TICK_S)
            turn.ended = time.time()

    def end(self) -> None:
        """Nothing more is asked or watched."""
        self.traffic.stop()
        self.watch.stop()
        with self._tolerant("runs"):
            self._note_runs()
        for turn in self.turns:
            turn.ended = turn.ended or time.time()

    def _is_over(self, turn: Turn, shift: Shift) -> bool:
        elapsed = time.time() - turn.began
        return elapsed >= LONGEST * shift.seconds or (elapsed >= shift.seconds and self._has_settled(turn))

    def _has_settled(self, turn: Turn) -> bool:
        """Nothing is dead, no run is under way, and the judge has seen enough of this shift to say that all is well."""
        last = next((v for at, v in reversed(turn.verdicts) if at - turn.began > self.config.drift.recent_s), None)
        quiet = last is not None and last.enough_data and not last.drifted
        return quiet and all(run.over for run in self.runs.values()) and not self.faults.under_way()

    def _look(self, turn: Turn) -> None:
        self.looked = time.time()
        with self._tolerant("runs"):
            self._note_runs()
        with self._tolerant("verdict"):
            turn.verdicts += [(time.time(), v) for v in judge_drift(self.config) if v.workload == "default"]
        with self._tolerant("sensor"):
            turn.sensor = sensor_said(self.stack.dagster_url) or turn.sensor

    def _note_runs(self) -> None:
        for run in runs_of(self.stack.dagster_url, "adapt_draft"):
            if run.run_id not in self.runs or run.status != self.runs[run.run_id].status:
                self._say(f"run {run.run_id[:8]}: {run.status.lower()}")
            self.runs[run.run_id] = run

    def _maintain(self) -> None:
        self.maintained = time.time()
        for job in MAINTENANCE:
            with self._tolerant("maintenance"):
                launch(self.stack.dagster_url, job)

    @contextlib.contextmanager
    def _tolerant(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.errors[what] += 1
            self.last_errors[what] = f"{type(error).__name__}: {error}"[:200]

    def _say(self, text: str) -> None:
        print(f"{time.time() - self.began:7.0f} s  {text}", file=sys.stderr, flush=True)

    def result(self) -> dict[str, Any]:
        """Everything found. Reads the state directory; needs no stack."""
        config, ended = self.config, max(turn.ended for turn in self.turns)
        history = DeploymentRecord(config.state.deployments, config.target).history()
        adaptations = [seen(config, run) for run in sorted(self.runs.values(), key=lambda r: r.created)]
        samples, bars = self.watch.samples, self.plan.bars
        shifts = [outcome(turn, adaptations, history) for turn in self.turns[1:]]
        kept_memory, kept_disk = memory(samples, bars), disk(samples, bars, config.retention.signal_gb, len(adaptations))
        told = self._adaptations(adaptations, history)
        found = {"seconds": round(ended - self.began, 1), "shifts": shifts, "requests": requests(self.traffic.tally, self.faults.done),
                 "adaptations": told, "stages_s_median": medians(told),
                 "faults": [f.as_dict(self.began) for f in self.faults.done], "faults_left": [f.name for f in self.faults.waiting],
                 "unbounded_memory": unbounded(kept_memory), "unbounded_disk": unbounded(kept_disk), "memory": kept_memory,
                 "disk": kept_disk, "looking_failed": dict(self.errors), "looking_failed_last": self._without_paths(),
                 "over_time": over_time(samples, self.began), "series": self._series(ended)}
        return {"missed": missed(found, bars), **found}

    def _adaptations(self, adaptations: list[Any], history: list[Any]) -> list[dict[str, Any]]:
        out = []
        for adaptation in adaptations:
            turn = next((t for t in self.turns if t.began <= adaptation.run.created < t.ended), None)
            if turn is None or turn.number not in self.traffic.tally.first_sent:
                continue
            sent = self.traffic.tally.first_sent[turn.number]
            found = stages(sent, adaptation, history, self.config.drift.recent_s)
            if found:
                inside = [f.fault.name for f in self.faults.done if sent <= f.at <= sent + found["total"]]
                before = sum(t.run.created < adaptation.run.created and t.run.created >= turn.began for t in adaptations)
                out.append({"turn": turn.number, "domain": turn.shift.domain, "attempt": before + 1, "faults": inside, "stages_s": found})
        return out

    def _series(self, ended: float) -> list[dict[str, Any]]:
        return [{"s": max(0, round(b.time - self.began)), "draft": b.draft_version, "tokens_per_s": round(b.tokens_per_s, 1),
                 "acceptance_length": b.acceptance_length and round(b.acceptance_length, 3),
                 "first_position_rate": b.first_position_rate and round(b.first_position_rate, 3)}
                for b in acceptance_series(self.config, self.began, SERIES_S, ended)]

    def _without_paths(self) -> dict[str, str]:
        return {what: said.replace(str(self.config.state.root), "STATE") for what, said in self.last_errors.items()}

    def page(self, path: Path) -> None:
        """The period's report, with shifts and faults marked."""
        data = collect(self.config, self.began, max(turn.ended for turn in self.turns))
        before = ["", *(turn.shift.domain for turn in self.turns)]
        marks = [(turn.began, f"{old} → {turn.shift.domain}") for old, turn in zip(before, self.turns, strict=False) if old]
        marks += [(f.at, f"killed: {f.fault.name}") for f in self.faults.done]
        write_report(path, dataclasses.replace(data, title="Soak of the loop", marks=[*data.marks, *marks]))


def settings(plan: Plan, args: argparse.Namespace, state: Path) -> TideConfig:
    folder = args.engine_dir.resolve()
    here = {"engine": folder.name, "engines_dir": str(folder.parent), "state_dir": str(state), "serve": {"replicas": args.replicas}}
    return override(load("pocket_demo", values=plan.values), here)


def tells_where(path: Path, config: TideConfig) -> list[str]:
    """What of this machine a file names."""
    text = path.read_text()
    return [what for what, word in (("a path", str(config.state.root)), ("its host", socket.gethostname())) if word in text]


def soak(args: argparse.Namespace, plan: Plan, config: TideConfig, result: dict[str, Any]) -> None:
    """Up, play, down whatever happens, then add up."""
    stack = LocalStack.up(config, say=lambda line: print(line, file=sys.stderr, flush=True), bound=True)
    try:
        played = Soak(config, plan, stack)
        try:
            played.play()
        finally:
            played.end()
    finally:
        result["killed_at_the_end"] = len(stack.down())
    result |= played.result() | {"replicas": args.replicas}
    if args.report:
        played.page(args.report)
        result["missed"] += [f"{args.report.name} tells {what}" for what in tells_where(args.report, config)]


def left_running(stack_root: Path) -> list[int]:
    """Processes that name the state directory."""
    return [p.pid for p in psutil.process_iter(["cmdline"])
            if str(stack_root) in " ".join(p.info["cmdline"] or []) and p.pid != os.getpid()]


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--report", type=Path, metavar="FILE", help="the `tide report` page of this soak")
    options.add_argument("--replicas", type=int, default=1, help="behind the front; more than one needs more cores")
    options.add_argument("--state", type=Path, metavar="DIR", help="an empty folder that is kept (default: a temporary one)")
    args = options.parse_args()
    result, plan = settle(), quick() if args.quick else full()
    state = (args.state or Path(tempfile.mkdtemp(prefix="tide-soak-loop-"))).resolve()
    try:
        soak(args, plan, settings(plan, args, state), result)
        if left := left_running(state):
            result["missed"].append(f"{len(left)} processes were left behind")
    finally:
        if args.state is None:
            shutil.rmtree(state, ignore_errors=True)
    finish(result, args)
    for line in result["missed"]:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if result["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
