"""From an engine build to live traffic: benchmark, verdict, rollout. The check is the gate's face; rollout asks the gate again."""

import dagster as dg

from tide_pipeline.defs.adaptation import served_build, served_key
from tide_pipeline.defs.draft import adaptation_of, draft_engine
from tide_pipeline.defs.lake import GROUP
from tide_pipeline.defs.resources import TideResource


@dg.asset(deps=[draft_engine], group_name=GROUP, kinds={"python"}, owners=["team:inference"])
def benchmark_report(context: dg.AssetExecutionContext, tide: TideResource) -> dg.MaterializeResult:
    """Champion and challenger side by side: acceptance on held-out windows, speed in the engine, greedy equivalence."""
    from tide_pipeline.gate.run import run_gate

    settings, adaptation = tide.settings(), adaptation_of(context, tide)
    asked = adaptation.request()
    report = run_gate(settings, adaptation.build(), served_build(settings, asked.workload), workload=asked.workload,
                      focus_since=asked.focus_since)
    paired, new = report.paired, report.challenger_bench
    return dg.MaterializeResult(metadata={
        "passed": report.verdict.passed, "acceptance_length": paired.challenger, "champion_acceptance_length": paired.champion,
        "gain": paired.gain, "gain_low": paired.gain_low, "gain_high": paired.gain_high, "held_out_prompts": paired.prompts,
        "tokens_per_s": new.tokens_per_s, "speedup": new.speedup, "compared_tokens": new.compared_tokens, "ties": new.ties,
        "mismatches": new.mismatches, **({"champion_tokens_per_s": report.champion_bench.tokens_per_s} if report.champion_bench else {})})


@dg.asset_check(asset=benchmark_report, blocking=True, description="Every door of the gate is open to the new draft.")
def challenger_beats_champion(context: dg.AssetCheckExecutionContext, tide: TideResource) -> dg.AssetCheckResult:
    from tide_pipeline.gate.run import load_verdict

    verdict = load_verdict(tide.settings(), adaptation_of(context, tide).build().build_id)
    return dg.AssetCheckResult(passed=verdict.passed, description=verdict.reasons,
                               metadata={name: door["reason"] for name, door in verdict.doors.items()})


@dg.asset(deps=[benchmark_report], group_name=GROUP, kinds={"nvidia"}, owners=["team:inference"])
def live_draft(context: dg.AssetExecutionContext, tide: TideResource) -> dg.MaterializeResult:
    """What the replicas serve: the deployment record after canary and bake, and MLflow's champion alias behind it."""
    from tide_pipeline.gate.run import load_verdict
    from tide_pipeline.registry.registry import open_registry
    from tide_pipeline.rollout.alias import follow_alias
    from tide_pipeline.rollout.promote import promote

    settings, adaptation = tide.settings(), adaptation_of(context, tide)
    build, asked = adaptation.build(), adaptation.request()
    key = served_key(settings, asked.workload)
    deployment = promote(settings, build, load_verdict(settings, build.build_id), workload=key, who=f"dagster run {context.run.run_id[:8]}",
                         reason=asked.reason or "launched by hand", progress=context.log.info)
    if deployment.groups["rest"].get(key) != build.build_id:
        raise dg.Failure(f"deployment {deployment.n} does not serve it: {deployment.reason}", allow_retries=False)
    follow_alias(settings, open_registry(settings), deployment)
    return dg.MaterializeResult(metadata={"deployment": deployment.n, "serves": key, "build_id": build.build_id,
                                          "draft_version": build.draft_version, "reason": deployment.reason})
