"""`tide demo`: the whole loop once, with real parts and real numbers. Scripts the traffic; the pipeline does the rest.

    healthy    prompts of a domain the shipped draft knows, 8 in flight, then measured one request at a time
    shifted    another domain: measured before anything reacts, then 8 in flight until the drift sensor has launched a run
    adapting   train, register, build, gate, roll out: watched, with two requests in flight to show that none fails
    adapted    measured again, on prompts that nobody has seen
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from tide_pipeline.capture.reader import count_rows
from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import DriftVerdict
from tide_pipeline.deployment.record import DeploymentRecord, read_observed
from tide_pipeline.drift.judge import judge_drift
from tide_pipeline.drift.series import live
from tide_pipeline.engine.text import TextCodec
from tide_pipeline.engine_spec import load_engine_spec
from tide_pipeline.errors import StackError, TideError
from tide_pipeline.provenance import write_json
from tide_pipeline.serve.client import TritonClient
from tide_pipeline.stack.local import LocalStack, down
from tide_pipeline.stack.measure import PhaseMeasurement, measure_phase
from tide_pipeline.stack.outcome import DemoOutcome, print_outcome, report_of
from tide_pipeline.stack.runs import RunView, runs_of
from tide_pipeline.stack.stages import detection_of, in_order, stages_of
from tide_pipeline.stack.traffic import Traffic, TrafficDefaults
from tide_pipeline.stack.view import ViewState, render
from tide_pipeline.workloads.prompts import Prompt, domain_prompts

MARKER = "demo"                   # a file that says: this state directory is a demo's and may be emptied
STEP_STAGES = {"draft_checkpoint": "train", "registered_draft": "register", "draft_engine": "build", "benchmark_report": "gate",
               "live_draft": "roll out"}


@dataclass(frozen=True)
class DemoPlan:
    """How long the demo's parts are."""

    healthy: str = "en"
    shifted: str = "html"
    warm_requests: int = 32           # healthy traffic before measuring
    measured_prompts: int = 20
    measured_tokens: int = 96
    sampled_share: int = 4            # every fourth measured prompt also at temperature 0.8
    concurrency: int = 8
    while_adapting: int = 2           # in flight while the pipeline works
    collect_timeout_s: float = 240.0
    adapt_timeout_s: float = 420.0
    same_prompts: bool = False        # measure "adapted" on the prompts of "shifted": few are enough to see a difference, none are unseen

    @staticmethod
    def short() -> DemoPlan:
        """As the end-to-end test plays it: enough to see the loop close, too little to quote."""
        return DemoPlan(warm_requests=24, measured_prompts=8, measured_tokens=48, collect_timeout_s=420.0, adapt_timeout_s=600.0,
                        same_prompts=True)


class StageFailed(TideError):
    """The loop did not close; says at which stage."""


@dataclass
class Demo:
    """One run. `say` prints a line above the live view."""

    config: TideConfig
    plan: DemoPlan
    stack: LocalStack
    state: ViewState
    say: Callable[[str], None]
    began: float = field(default_factory=time.time)
    phases: list[PhaseMeasurement] = field(default_factory=list)
    failed: int = 0
    stages_s: dict[str, float] = field(default_factory=dict)
    verdict: DriftVerdict | None = None
    run: RunView | None = None
    shifted_at: float = 0.0
    marks: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.client = TritonClient(self.stack.triton_url, self.config.target)
        spec = load_engine_spec(self.config.engine_dir)
        self.tokenize = TextCodec(self.config.engine_dir / spec.model).encode
        self.prompts = {d: domain_prompts(self.config.engine_dir, d) for d in (self.plan.healthy, self.plan.shifted)}

    def play(self) -> DemoOutcome:
        """All phases. Raises StageFailed."""
        plan = self.plan
        healthy, shifted = self.prompts[plan.healthy], self.prompts[plan.shifted]
        n = plan.measured_prompts
        self._phase(f"healthy: {plan.healthy}")
        self._send(healthy[n : n + plan.warm_requests], plan.concurrency)
        self._measure("healthy", healthy[:n])
        self.shifted_at = time.time()
        self._phase(f"shifted: {plan.healthy} → {plan.shifted}")
        self._measure("shifted", shifted[:n])
        self._until_launched(shifted[2 * n :])
        self.stages_s |= detection_of(self.run, self.shifted_at)
        self._phase("adapting")
        self._until_adapted(shifted[2 * n :])
        self._phase("adapted")
        self._measure("adapted", shifted[:n] if plan.same_prompts else shifted[n : 2 * n])
        return DemoOutcome(self.config, self.phases, self.failed, self.collected(), in_order(self.stages_s), self.verdict, self.run,
                           self.marks, self.began, self.stack.urls())

    def collected(self) -> int:
        """Token rows in the lake."""
        return count_rows(self.config.state.signals, self.config.target)

    # --- phases ---------------------------------------------------------------------------------------------------

    def _phase(self, name: str) -> None:
        self.state.phase = name
        self.marks.append((time.time(), name))
        self.say(f"[bold]{name}[/bold]")

    def _send(self, prompts: list[Prompt], concurrency: int) -> None:
        traffic = Traffic(self.client, prompts, concurrency, TrafficDefaults()).start()
        self.state.stage = "traffic"
        while traffic.running:
            sent = traffic.stats()
            self.state.share, self.state.detail = sent.finished / len(prompts), f"{sent.finished} of {len(prompts)} requests"
            self._tick(traffic)
        self._count(traffic)

    def _measure(self, name: str, prompts: list[Prompt]) -> None:
        self.state.stage, self.state.in_flight = "measure", 1

        def progress(done: int, total: int) -> None:
            self.state.share, self.state.detail = done / total, f"{done} of {total} prompts: off, auto, fixed 3"
            self._look()

        phase = measure_phase(self.client, name, prompts, tokenize=self.tokenize, tokens=self.plan.measured_tokens,
                              sampled_share=self.plan.sampled_share, progress=progress)
        self.phases.append(phase)
        self.failed += phase.failed
        head = phase.headline()
        self.say(f"  {name}: acceptance length {head.acceptance_length:.2f}, {head.tokens_per_s:.0f} tokens/s, "
                 f"{head.speedup.median:.2f}x of no speculation (fixed 3: {head.speedup_fixed.median:.2f}x) on {head.name} text")

    def _until_launched(self, prompts: list[Prompt]) -> None:
        """Shifted traffic until the run that the sensor launched trains: it is asked for before the last signals are there."""
        self.state.stage, self.state.share = "drift", None
        traffic = Traffic(self.client, itertools.cycle(prompts), self.plan.concurrency, TrafficDefaults()).start()
        deadline = time.time() + self.plan.collect_timeout_s
        try:
            while self.run is None or not (self.run.over or "draft_checkpoint" in self.run.steps):
                if time.time() > deadline:
                    said = self.verdict.reason if self.verdict else "no verdict"
                    raise StageFailed(f"drift: no run was launched in {self.plan.collect_timeout_s:.0f} s "
                                      f"({said}; {self.collected():,} rows)")
                self._judge()
                need = self.config.drift.min_signal_rows
                self.state.stage = "collect" if self.verdict and self.verdict.drifted else "drift"
                self.state.share = min(1.0, self.collected() / need)
                self.state.detail = f"{self.collected():,} of {need:,} token rows"
                self._tick(traffic)
                self.run = next(iter(runs_of(self.stack.dagster_url, "adapt_draft")), None)
        finally:
            traffic.stop()
            self._count(traffic)
        self.marks.append((self.run.created, "run launched"))
        self.say(f"  drift: {self.verdict.reason if self.verdict else ''}")

    def _until_adapted(self, prompts: list[Prompt]) -> None:
        """Watch the run to its end, with a little traffic."""
        assert self.run is not None
        traffic = Traffic(self.client, itertools.cycle(prompts), self.plan.while_adapting, TrafficDefaults()).start()
        deadline = time.time() + self.plan.adapt_timeout_s
        try:
            while not self.run.over:
                if time.time() > deadline:
                    raise StageFailed(f"{self.state.stage}: not done in {self.plan.adapt_timeout_s:.0f} s, see the run at {self.run_url}")
                self.run = next(r for r in runs_of(self.stack.dagster_url, "adapt_draft") if r.run_id == self.run.run_id)
                self._show_steps(self.run)
                self._tick(traffic)
        finally:
            traffic.stop()
            self._count(traffic)
        if self.run.status != "SUCCESS":
            raise StageFailed(f"{self._failed_stage()}: the Dagster run ended as {self.run.status}, see {self.run_url}")
        deployed = DeploymentRecord(self.config.state.deployments, self.config.target).latest()
        version = self._observed_version()
        if deployed is None or not version.startswith("v"):
            raise StageFailed(f"roll out: the run succeeded, but the replica serves {version}")
        self.stages_s |= stages_of(self.run, self.config.state.training, self.shifted_at)
        self.marks.append((deployed.created_at, f"{version} live"))
        self.say(f"  live: {version} (deployment {deployed.n}: {deployed.reason})")

    @property
    def run_url(self) -> str:
        return f"{self.stack.dagster_url}/runs/{self.run.run_id if self.run else ''}"

    # --- looking --------------------------------------------------------------------------------------------------

    def _show_steps(self, run: RunView) -> None:
        for key, stage in STEP_STAGES.items():
            step = run.steps.get(key)
            if step and step.ended and stage not in self.stages_s:
                self.stages_s[stage] = step.ended - step.started
                self.state.done.append((stage, self.stages_s[stage]))
                self.marks.append((step.ended, f"{stage} done"))
                self.say(f"  {stage}: {self.stages_s[stage]:.1f} s")
            if step and step.started and not step.ended:
                self.state.stage, self.state.share, self.state.detail = stage, None, f"{time.time() - step.started:.0f} s"
        if self.state.stage == "train":
            self._training_progress()

    def _training_progress(self) -> None:
        files = sorted(self.config.state.training.glob("**/progress.json"), key=lambda p: p.stat().st_mtime)
        if files:
            try:
                p: dict[str, Any] = json.loads(files[-1].read_text())
            except (OSError, json.JSONDecodeError):
                return
            self.state.share = p.get("share")
            self.state.detail = (f"step {p.get('step')}, loss {p.get('loss') or 0:.2f}, acceptance {p.get('acceptance') or 0:.2f}, "
                                 f"{p.get('rows_per_s') or 0:.0f} rows/s, {p.get('time_left_s') or 0:.0f} s left")

    def _failed_stage(self) -> str:
        steps = self.run.steps if self.run else {}
        return next((stage for key, stage in STEP_STAGES.items() if key not in steps or steps[key].status == "FAILURE"), "adapt")

    def _observed_version(self) -> str:
        observed = read_observed(self.config.state.observed, self.config.target)
        ids = {build for state in observed.values() for build in state.drafts.values()}
        return ", ".join(sorted(self.stack.draft_version(build) for build in ids)) or "no draft"

    def _judge(self) -> None:
        verdicts = [v for v in judge_drift(self.config) if v.workload == "default"]
        if verdicts:
            self.verdict = verdicts[0] if not (self.verdict and self.verdict.drifted) else self.verdict
            self.state.drift = self.verdict.reason

    def _tick(self, traffic: Traffic) -> None:
        sent = traffic.stats()
        self.state.in_flight, self.state.failed = sent.sent - sent.finished - sent.failed, self.failed + sent.failed
        self._look()
        time.sleep(1.0)

    def _look(self) -> None:
        now = live(self.config, 5.0)
        self.state.acceptance_length, self.state.first_position_rate = now.acceptance_length, now.first_position_rate
        self.state.tokens_per_s, self.state.collected_rows = now.tokens_per_s, self.collected()
        self.state.draft_version, self.state.elapsed_s = now.draft_version or self.state.draft_version, time.time() - self.began
        self.state.sample()

    def _count(self, traffic: Traffic) -> None:
        sent = traffic.join()
        self.failed += sent.failed


def begin_anew(config: TideConfig) -> None:
    """An empty state directory: the demo begins with the shipped draft. Only what an earlier demo left is removed.

    Raises:
        StackError: a stack is up there, or the directory holds something else.
    """
    root = config.state.root
    if LocalStack.running(config.state) is not None:
        raise StackError(f"a stack is up in {root}: stop it with `tide down --state {root}`, or give the demo another --state")
    if root.is_dir() and any(root.iterdir()):
        if not (root / MARKER).exists():
            raise StackError(f"{root} holds data that is no demo's: give the demo another --state, it begins with an empty one")
        with contextlib.suppress(StackError):
            down(config.state)                                     # what is left of a stack that died half-way
        shutil.rmtree(root)
    root.mkdir(parents=True, exist_ok=True)
    (root / MARKER).touch()


def run_demo(config: TideConfig, *, plan: DemoPlan | None = None, json_file: Path | None = None, report_file: Path | None = None,
             keep: bool = False, console: Console | None = None) -> int:
    """Play the demo; 0 when the loop closed with no failed request, 1 with the stage that did not."""
    console = console or Console()
    begin_anew(config)
    stack = LocalStack.up(config, say=lambda line: console.print(line, highlight=False), bound=not keep)
    try:
        for name, url in stack.urls().items():
            console.print(f"  {name:8s} {url}")
        state = ViewState()
        with Live(render(state), console=console, refresh_per_second=2, get_renderable=lambda: render(state), transient=True):
            demo = Demo(config, plan or DemoPlan(), stack, state, console.print)
            try:
                outcome = demo.play()
            except TideError as error:
                console.print(f"[red]the loop did not close[/red] at {error}", soft_wrap=True)
                if json_file:
                    write_json(json_file, {"closed": False, "failed_at": str(error), "failed_requests": demo.failed,
                                           "phases": [p.as_dict() for p in demo.phases], "adaptation_s": demo.stages_s})
                return 1
        report = report_file or config.state.reports / "report.html"
        report_of(outcome, report)
        print_outcome(outcome, console, report)
        if json_file:
            write_json(json_file, outcome.as_dict())
        return 0 if outcome.closed else 1
    finally:
        if keep:
            console.print("the stack stays up; stop it with [bold]tide down --state " + config.state_dir + "[/bold]", soft_wrap=True)
        else:
            stack.down()
