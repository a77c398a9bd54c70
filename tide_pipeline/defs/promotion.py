"""From an engine build to live traffic: benchmark, verdict, rollout. The check is the gate's face; rollout asks the gate again."""

import contextlib
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

import dagster as dg

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import Deployment, EngineBuild, GateVerdict
from tide_pipeline.defs.adaptation import Adaptation, served_build, served_key
from tide_pipeline.defs.draft import adaptation_of, answering, draft_engine, waiting_while_away
from tide_pipeline.defs.drift_sensor import MOST_WINDOWS
from tide_pipeline.defs.episodes import LEAD_S
from tide_pipeline.defs.keys import pool_of
from tide_pipeline.defs.lake import GROUP
from tide_pipeline.defs.resources import TideResource
from tide_pipeline.defs.split import ASKED, BEGUN, COLLECTED, JUDGED, split, without_waiting
from tide_pipeline.defs.tags import PASSED, TARGET, WORKLOAD
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.errors import BuildError, RegistryError, TideError

if TYPE_CHECKING:
    from tide_pipeline.gate.run import GateReport

TICK_S = 10.0                              # that a sensor's round and its lingering may take
SERVE_POOL = pool_of("serve_gpu")          # what measures speed on the devices that serve: one at a time, or both are slow


@dg.asset(deps=[draft_engine], group_name=GROUP, kinds={"python"}, owners=["team:inference"], pool=SERVE_POOL)
def benchmark_report(context: dg.AssetExecutionContext, tide: TideResource) -> dg.MaterializeResult:
    """Champion and challenger side by side: acceptance on held-out windows, speed in the engine, greedy equivalence.

    Of TensorRT-LLM only acceptance; its speed is measured on the canary.
    """
    from tide_pipeline.gate.run import run_gate

    settings, adaptation = tide.settings(), adaptation_of(context, tide)
    asked = adaptation.request()
    with answering(context, settings, adaptation), waiting_while_away(context.retry_number):
        report = run_gate(settings, adaptation.build(), served_build(settings, asked.workload), workload=asked.workload,
                          focus_since=asked.focus_since, replays=adaptation.replays)
    tell_registry(context, settings, adaptation, report.verdict)
    adaptation.mark(**{JUDGED: time.time()})
    paired = report.paired
    return dg.MaterializeResult(metadata={
        "passed": report.verdict.passed, "acceptance_length": paired.challenger, "champion_acceptance_length": paired.champion,
        "gain": paired.gain, "gain_low": paired.gain_low, "gain_high": paired.gain_high, "held_out_prompts": paired.prompts,
        **timed(report)})


def timed(report: "GateReport") -> dict[str, float | str]:
    """What the engine was measured at; or that it was not, and where it will be."""
    new, old = report.challenger_bench, report.champion_bench
    if new is None:
        return {"not_measured_here": "; ".join(f"{name}: {door['reason']}" for name, door in report.verdict.doors.items()
                                               if "measured_on" in door)}
    return {"tokens_per_s": new.tokens_per_s, "speedup": new.speedup, "compared_tokens": new.compared_tokens, "ties": new.ties,
            "mismatches": new.mismatches, **({"champion_tokens_per_s": old.tokens_per_s} if old else {})}


@dg.asset_check(asset=benchmark_report, blocking=True, description="Every door of the gate is open to the new draft.")
def challenger_beats_champion(context: dg.AssetCheckExecutionContext, tide: TideResource) -> dg.AssetCheckResult:
    from tide_pipeline.gate.run import load_verdict

    verdict = load_verdict(tide.settings(), adaptation_of(context, tide).build().build_id)
    return dg.AssetCheckResult(passed=verdict.passed, description=verdict.reasons,
                               metadata={name: door["reason"] for name, door in verdict.doors.items()})


@dg.asset(deps=[benchmark_report], group_name=GROUP, kinds={"nvidia"}, owners=["team:inference"], output_required=False,
          freshness_policy=dg.FreshnessPolicy.time_window(warn_window=timedelta(days=14), fail_window=timedelta(days=60)))
def live_draft(context: dg.AssetExecutionContext, tide: TideResource) -> Iterator[dg.MaterializeResult]:
    """What the replicas serve: the deployment record after canary, bake and steps, and MLflow's champion alias behind it.

    In mode "observe" nothing happens here; in mode "propose" the job approve_rollout waits for somebody to launch it.
    """
    from tide_pipeline.gate.run import load_verdict
    from tide_pipeline.rollout.mode import Mode, mode_of
    from tide_pipeline.rollout.promote import promote, propose

    settings, adaptation = tide.settings(), adaptation_of(context, tide)
    build, asked, mode = adaptation.build(), adaptation.request(), mode_of(settings)
    key, verdict = served_key(settings, asked.workload), load_verdict(settings, build.build_id)
    who, reason = f"dagster run {context.run.run_id[:8]}", asked.reason or "launched by hand"
    if verdict.passed:
        context.instance.add_run_tags(context.run.run_id, {PASSED: build.build_id, TARGET: settings.target, WORKLOAD: asked.workload})
    if mode is Mode.OBSERVE:
        context.log.info(f"{build.draft_version} passed the gate and is not deployed: rollout.mode is observe. "
                         f"`tide rollout {build.build_id}` does it by hand, or the job promote")
        return
    if mode is Mode.PROPOSE:
        proposed = propose(settings, build, verdict, workload=key, who=who, reason=reason)
        context.log.info(f"deployment {proposed.n} proposes {build.draft_version}: launch the job approve_rollout, or leave it")
        return
    deployment = promote(settings, build, verdict, workload=key, who=who, reason=reason, progress=context.log.info)
    yield served(context.log, settings, deployment, build, key, adaptation)


def served(log: dg.DagsterLogManager, settings: TideConfig, deployment: Deployment, build: EngineBuild, key: str,
           adaptation: Adaptation) -> dg.MaterializeResult:
    """The end of a rollout as an event, or a failure that tells why the draft was rolled back."""
    from tide_pipeline.registry.registry import open_registry
    from tide_pipeline.rollout.alias import follow_alias

    if deployment.groups["rest"].get(key) != build.build_id:
        raise dg.Failure(f"deployment {deployment.n} does not serve it: {deployment.reason}", allow_retries=False)
    try:
        log.info(f"aliases: {follow_alias(settings, open_registry(settings), deployment)}")
    except (RegistryError, BuildError) as error:           # the rollout is over; alias_sensor looks every 30 s
        log.warning(f"aliases were not moved, the sensor will: {error}")
    mark_collected(settings, adaptation)
    stages = split(adaptation.marks(), DeploymentRecord(settings.state.deployments, settings.target).history(), deployment)
    adaptation.save_stages(stages)
    return dg.MaterializeResult(metadata={"deployment": deployment.n, "serves": key, "build_id": build.build_id,
                                          "draft_version": build.draft_version, "reason": deployment.reason,
                                          **{f"{stage.replace(' ', '_')}_s": s for stage, s in stages.items()},
                                          "without_collect_train_bake_s": without_waiting(stages)})


def mark_collected(settings: TideConfig, adaptation: Adaptation) -> None:
    """When what the drift sensor waits for was there: it asks for a run some seconds before. For figures alone.

    Not there when the trainer looked, it is left out, and the whole launch counts as one. Longer than TICK_S before the run was asked for,
    it was no tick that the run waited for, but a cool-down, another run or a person.
    """
    from tide_pipeline.capture.reader import reached_at

    asked, marks = adaptation.request(), adaptation.marks()
    if asked.drifted_at and BEGUN in marks:
        with contextlib.suppress(TideError):
            reached = reached_at(settings.state.signals, settings.target, asked.workload, settings.drift.min_signal_rows,
                                 since=asked.focus_since, until=marks[BEGUN] + LEAD_S, among=MOST_WINDOWS)
            if reached is not None:
                adaptation.mark(**{COLLECTED: max(asked.drifted_at, marks[ASKED] - TICK_S, min(reached, marks[BEGUN]))})


def tell_registry(context: dg.AssetExecutionContext, settings: TideConfig, adaptation: Adaptation, verdict: GateVerdict) -> None:
    """The verdict as tags of the version; one that is refused is no challenger any more. A registry that is away delays no rollout."""
    from tide_pipeline.registry.registry import RegisteredDraft, open_registry
    from tide_pipeline.rollout.alias import answer_request
    from tide_pipeline.rollout.challenger import GATE, step_down

    try:
        version, registry = adaptation.load(RegisteredDraft, "registered").version, open_registry(settings)
        told = "passed" if verdict.passed else "refused"
        registry.tag(version, {GATE: told, "gate_reason": verdict.reasons, "gate_run": context.run.run_id})
        answer_request(registry, version, f"{told} by the gate")
        if not verdict.passed:
            step_down(registry, version)
    except (RegistryError, BuildError) as error:
        context.log.warning(f"the verdict is not in the registry: {error}")
