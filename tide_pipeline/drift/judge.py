"""Decide drift from first-position acceptance. `judge` is pure; `judge_drift` asks the log and the deployment record, and changes nothing.

A workload has drifted when the whole 95 % interval of the drop, baseline - recent, lies at or above `drift.min_drop`; with another
`drift.policy`, when that says so (watch.py). What makes too little data is the same for all.
"""

from __future__ import annotations

import time

from tide_pipeline.config import DriftSettings, TideConfig
from tide_pipeline.contracts import DriftVerdict
from tide_pipeline.drift.acceptance import MIN_REQUESTS, REACH, newest_versions, recent
from tide_pipeline.drift.deployed import read_deployed
from tide_pipeline.drift.early import baseline_steps, early_life
from tide_pipeline.drift.rates import RateEstimate, drop_interval
from tide_pipeline.drift.watch import Said, watch


def judge_drift(config: TideConfig, now: float | None = None) -> list[DriftVerdict]:
    """One verdict per workload tag with recent traffic on a draft, by tag. Raises LakeError when the log can't be read."""
    now = time.time() if now is None else now
    newest = newest_versions(config, now)
    if not newest:
        return []
    deployed = read_deployed(config)
    versions = {workload: deployed.version_of(workload) or version for workload, version in newest.items()}
    lives = {version: early_life(config, version, deployed.since.get(version)) for version in sorted(set(versions.values()))}
    earlies = {workload: lives[version].of(workload) for workload, version in versions.items()}
    complete = {workload: early for workload, early in earlies.items() if early is not None and early.is_complete}
    rates = recent(config, now, versions, {workload: early.until for workload, early in complete.items()})
    said = {}
    if config.drift.policy != "judge":
        said = watch(config, now, {(workload, versions[workload]): early for workload, early in complete.items()})
    return [judge(target=config.target, workload=workload, draft_version=version, recent=rates.get(workload),
                  baseline=complete[workload].estimate if workload in complete else None,
                  baseline_so_far=early.estimate.steps if (early := earlies[workload]) else 0, settings=config.drift,
                  said=said.get((workload, version)))
            for workload, version in versions.items()]


def judge(*, target: str, workload: str, draft_version: str, recent: RateEstimate | None, baseline: RateEstimate | None,
          settings: DriftSettings, baseline_so_far: int = 0, said: Said | None = None) -> DriftVerdict:
    """The verdict on these numbers. `baseline` None: not known yet, `baseline_so_far` drafted steps of it are in. `said`: by what decides
    in place of the interval."""
    lacking = _lacking(recent, baseline, baseline_so_far, settings, draft_version)
    if lacking or recent is None or baseline is None:
        return DriftVerdict(target, workload, drifted=False, enough_data=False, first_position_rate=recent.rate if recent else 0.0,
                            baseline_rate=baseline.rate if baseline else 0.0, drop=0.0, drop_low=-1.0, drop_high=1.0,
                            num_steps=recent.steps if recent else 0, baseline_steps=baseline.steps if baseline else baseline_so_far,
                            draft_version=draft_version, reason=f"too little data: {lacking}")
    drop, low, high = drop_interval(recent, baseline)
    drifted = said.has_fired if said is not None else low >= settings.min_drop
    reason = (f"first-position acceptance {recent.rate:.2f}, baseline {baseline.rate:.2f}, drop {drop:.2f} ({low:.2f} to {high:.2f}) "
              f"over {recent.steps} steps: {_decided(low, settings, said)}")
    return DriftVerdict(target, workload, drifted=drifted, enough_data=True, first_position_rate=recent.rate, baseline_rate=baseline.rate,
                        drop=drop, drop_low=low, drop_high=high, num_steps=recent.steps, baseline_steps=baseline.steps,
                        draft_version=draft_version, reason=reason)


def _decided(low: float, settings: DriftSettings, said: Said | None) -> str:
    """By what."""
    if said is not None:
        return f"{said.policy} {'fires' if said.has_fired else 'is quiet'}, {said.why}"
    return (f"lower end {'>=' if low >= settings.min_drop else '<'} {settings.min_drop:.2f}"
            + ("; a real drop, not surely a large one" if 0 < low < settings.min_drop else ""))


def _lacking(recent: RateEstimate | None, baseline: RateEstimate | None, so_far: int, settings: DriftSettings, version: str) -> str:
    """What is missing for a verdict; "" when nothing is."""
    if baseline is None:
        return f"the baseline of {version} has {so_far} of {baseline_steps(settings)} drafted steps, of {MIN_REQUESTS} requests or more"
    if recent is None or recent.steps < settings.min_steps:
        return (f"{recent.steps if recent else 0} of {settings.min_steps} drafted steps of {version} since its baseline, "
                f"in the last {REACH * settings.recent_s:.0f} s")
    if recent.requests < MIN_REQUESTS or recent.freedom < 1:
        return f"{recent.requests} of {MIN_REQUESTS} requests of {version} that drafted"
    return ""
