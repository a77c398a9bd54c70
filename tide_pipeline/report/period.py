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
from tide_pipeline.report.data import ReportData, Span

BUCKETS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 3 * 3600, 6 * 3600, 86_400)
MOST_BUCKETS = 180


def collect(config: TideConfig, since: float, until: float | None = None) -> ReportData:
    """What happened from `since` to `until` (Unix seconds, now by default). Raises LakeError when the log can't be read."""
    until = time.time() if until is None else until
    builds = list_builds(config.state.builds, config.target)
    made = [build for build in builds if since <= build.created_at <= until]
    births = {build.draft_version: birth for build in reversed(made) if "curve" in (birth := _birth(build))}
    deployments = [d for d in DeploymentRecord(config.state.deployments, config.target).history() if since <= d.created_at <= until]
    versions = {build.build_id: build.draft_version for build in builds}
    return ReportData(
        title=f"tide_pipeline, target {config.target}", since=since, until=until,
        series=acceptance_series(config, since, bucket_of(until - since), until), marks=rollout_marks(deployments, versions),
        spans=[_training_span(version, birth) for version, birth in births.items() if _overlaps(birth, since)],
        training={version: birth["curve"] for version, birth in births.items()}, verdicts=judge_drift(config, until),
        gates=_gates(config, builds, since, until), deployments=deployments, versions=versions, facts=_facts(config))


def bucket_of(seconds: float) -> float:
    """A round bucket length that makes a plot of that many seconds legible."""
    return float(next((b for b in BUCKETS_S if seconds / b <= MOST_BUCKETS), BUCKETS_S[-1]))


def rollout_marks(deployments: Sequence[Deployment], versions: Mapping[str, str]) -> list[tuple[float, str]]:
    """When which draft version went where."""
    marks = []
    for d in deployments:
        group = d.groups.get("canary", d.groups.get("rest", {})) if d.stage in ("canary", "rolling") else d.groups.get("rest", {})
        names = ", ".join(sorted({versions.get(build, build) for build in group.values()}))
        marks.append((d.created_at, f"{d.stage.replace('_', ' ')}: {names}"))
    return marks


def _birth(build: EngineBuild) -> dict[str, Any]:
    """The draft's birth certificate; empty where it can't be read."""
    try:
        found: dict[str, Any] = json.loads((Path(build.path) / "draft" / "provenance.json").read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return found if "created_at" in found and "train_s" in found else {}


def _training_span(version: str, birth: Mapping[str, Any]) -> Span:
    return Span(birth["created_at"] - birth["train_s"], birth["created_at"], f"training {version}")


def _overlaps(birth: Mapping[str, Any], since: float) -> bool:
    return bool(birth["created_at"] > since)


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
