"""Gather a report of a period from what the system has written down. Reads the lake, builds, gate reports and deployments."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import Deployment, EngineBuild, GateVerdict
from tide_pipeline.deployment.builds import list_builds
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.drift.judge import judge_drift
from tide_pipeline.drift.series import acceptance_series
from tide_pipeline.errors import GateNotPassed
from tide_pipeline.gate.run import load_report, report_file
from tide_pipeline.provenance import birth_certificate
from tide_pipeline.report.data import Drift, ReportData, Span, Trained
from tide_pipeline.report.parts import DASH
from tide_pipeline.report.savings import Savings, find_savings
from tide_pipeline.rollout.history import began_of, is_under_way, rest_of

BUCKETS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 3 * 3600, 6 * 3600, 86_400)
MOST_BUCKETS = 180


def collect(config: TideConfig, since: float, until: float | None = None, *, with_savings: bool = True) -> ReportData:
    """What happened from `since` to `until` (Unix seconds, now by default). Savings replay captured windows: seconds to minutes.

    Raises LakeError when the log can't be read.
    """
    until = time.time() if until is None else until
    builds = list_builds(config.state.builds, config.target)
    births = {build.draft_version: birth for build in reversed(builds) if (birth := _birth(build))}
    made = {version: birth for version, birth in births.items() if since <= birth["created_at"] <= until and "curve" in birth}
    history = [d for d in DeploymentRecord(config.state.deployments, config.target).history() if d.created_at <= until]
    versions = {build.build_id: build.draft_version for build in builds}
    trainings, drifts = trained(made), drifts_of(config, births, since, until)
    bucket_s, lately = bucket_of(until - since), [d for d in history if since <= d.created_at]
    return ReportData(
        title=f"tide_pipeline, target {config.target}", since=since, until=until,
        series=acceptance_series(config, since, bucket_s, until),
        savings=_savings(config, since, until, bucket_s, history, builds, trainings) if with_savings else None,
        marks=[*rollout_marks(lately, versions), *((d.at, f"drift: {d.workload}") for d in drifts)],
        spans=[Span(t.ended - t.seconds, t.ended, f"training {t.draft_version}") for t in trainings],
        training={version: birth["curve"] for version, birth in made.items()}, trainings=trainings, drifts=drifts,
        verdicts=judge_drift(config, until), gates=_gates(config, builds, since, until), deployments=lately, versions=versions,
        facts=_facts(config))


def bucket_of(seconds: float) -> float:
    """A round bucket length that makes a plot of that many seconds legible."""
    return float(next((b for b in BUCKETS_S if seconds / b <= MOST_BUCKETS), BUCKETS_S[-1]))


def rollout_marks(deployments: Sequence[Deployment], versions: Mapping[str, str]) -> list[tuple[float, str]]:
    """When which draft version went where; of a rollout that has ended its end alone."""
    ended = {d.began for d in deployments if d.began and not is_under_way(d)}
    marks = []
    for d in deployments:
        if is_under_way(d) and began_of(d) in ended:
            continue
        group = d.groups.get("canary", d.groups.get("rest", {})) if is_under_way(d) else d.groups.get("rest", {})
        names = ", ".join(sorted({versions.get(build, build) for build in group.values()}))
        marks.append((d.created_at, f"{d.stage.replace('_', ' ')}: {names}"))
    return marks


def trained(births: Mapping[str, Mapping[str, Any]]) -> list[Trained]:
    """What trainings cost, oldest first."""
    found = [Trained(version, birth["created_at"], birth["train_s"] * birth.get("processes", 1), birth.get("rows", 0),
                     birth.get("start_acceptance_length", 0.0), birth.get("acceptance_length", 0.0)) for version, birth in births.items()]
    return sorted(found, key=lambda t: t.ended)


def drifts_of(config: TideConfig, births: Mapping[str, Mapping[str, Any]], since: float, until: float) -> list[Drift]:
    """What drafts were trained for, from the folders of their adaptations, oldest first."""
    version_of = {birth.get("digest"): version for version, birth in births.items()}
    found = []
    for file in config.state.training.glob("*/request.json"):
        try:
            asked = json.loads(file.read_text())
            at = asked["focus_since"] + config.drift.recent_s      # an episode's windows begin so long before its first verdict
            done = file.parent / "draft" / "checkpoint.json"
            digest = json.loads(done.read_text())["digest"] if done.exists() else ""
            if since <= at <= until:
                found.append(Drift(at, asked["workload"], version_of.get(digest, DASH), asked["reason"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(found, key=lambda d: d.at)


def _birth(build: EngineBuild) -> dict[str, Any]:
    """The draft's birth certificate; empty where it can't be read."""
    try:
        found: dict[str, Any] = json.loads((Path(build.path) / "draft" / "provenance.json").read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return found if "created_at" in found and "train_s" in found else {}


def _savings(config: TideConfig, since: float, until: float, bucket_s: float, history: Sequence[Deployment], builds: Sequence[EngineBuild],
             trainings: Sequence[Trained]) -> Savings | None:
    drafts = {build.draft_version: Path(build.path) / "draft" for build in builds}
    by_id = {build.build_id: build.draft_version for build in builds}
    first = next(iter(rest_of(history[0]).values()), "") if history else ""
    return find_savings(config, since, until, bucket_s, static=by_id.get(first, ""), drafts=drafts,
                        training=[(t.ended, t.seconds) for t in trainings])


def _gates(config: TideConfig, builds: Sequence[EngineBuild], since: float, until: float) -> list[GateVerdict]:
    """Verdicts that were written in the period, oldest first."""
    found = []
    for build in builds:
        try:
            written = report_file(config, build.build_id).stat().st_mtime
            if since <= written <= until:
                found.append((written, load_report(config, build.build_id).verdict))
        except (FileNotFoundError, GateNotPassed):
            continue
    return [verdict for _, verdict in sorted(found, key=lambda pair: pair[0])]


def _facts(config: TideConfig) -> dict[str, str]:
    birth = birth_certificate()
    packages = ", ".join(f"{name} {version}" for name, version in birth["packages"].items())
    return {"machine": birth["machine"], "python": birth["python"], "packages": packages, "revision": birth["git_sha"],
            "engine": f"{config.engine}, serving on {config.serve.device} ({config.serve.threads} threads), training on "
                      f"{config.training.device} ({config.training.threads} threads)",
            "drift": f"{config.drift.recent_s:.0f} s windows, {config.drift.min_steps} drafted steps, drop {config.drift.min_drop:.2f}",
            "training budget": f"{config.training.time_budget_s:.0f} s"}
