"""Gather a report of a period from what the system has written down. Reads the lake, trainings, builds, gate reports and deployments.

Builds go after a week (rollout/tidy.py): what a longer period needs of a refused one is read from its training and its gate report.
"""

from __future__ import annotations

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
from tide_pipeline.provenance import birth_certificate, read_record
from tide_pipeline.report.data import ReportData, Span, Trained
from tide_pipeline.report.gates import gate_verdicts, within
from tide_pipeline.report.savings import Savings, find_savings
from tide_pipeline.report.training_folder import TrainingFolder, training_folders
from tide_pipeline.report.trainings import drifts_of, trainings_of
from tide_pipeline.rollout.history import began_of, is_under_way, rest_of

BUCKETS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 3 * 3600, 6 * 3600, 86_400)
MOST_BUCKETS = 180


def collect(config: TideConfig, since: float, until: float | None = None, *, with_savings: bool = True) -> ReportData:
    """What happened from `since` to `until` (Unix seconds, now by default). Savings replay captured windows: seconds to minutes.

    Raises LakeError when the log can't be read.
    """
    until = time.time() if until is None else until
    builds, folders, judged = list_builds(config.state.builds, config.target), training_folders(config), gate_verdicts(config)
    births = {build.draft_version: birth for build in reversed(builds) if (birth := _birth(build))}
    history = [d for d in DeploymentRecord(config.state.deployments, config.target).history() if d.created_at <= until]
    versions = names_of(builds, folders, judged)
    trainings, drifts = trainings_of(folders, births, since, until), drifts_of(folders, births, config.drift.recent_s, since, until)
    bucket_s, lately = bucket_of(until - since), [d for d in history if since <= d.created_at]
    return ReportData(
        title=f"tide_pipeline, target {config.target}", since=since, until=until,
        series=acceptance_series(config, since, bucket_s, until),
        savings=_savings(config, since, until, bucket_s, history, versions, drafts_of(builds, folders), trainings.found)
        if with_savings else None,
        marks=[*rollout_marks(lately, versions), *((d.at, f"drift: {d.workload}") for d in drifts)],
        spans=[Span(t.began, t.ended, f"training {t.draft_version or 'without a draft'}") for t in trainings.found],
        training=trainings.curves, trainings=trainings.found, untimed_trainings=trainings.untimed, drifts=drifts,
        verdicts=judge_drift(config, until), gates=within(judged, since, until), deployments=lately, versions=versions,
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


def names_of(builds: Sequence[EngineBuild], folders: Sequence[TrainingFolder],
             judged: Sequence[tuple[float, str, GateVerdict]]) -> dict[str, str]:
    """Build id -> draft version, of builds that have gone too."""
    gone = {str(folder.build["build_id"]): folder.draft_version for folder in folders if "build_id" in folder.build}
    return {build_id: verdict.challenger for _, build_id, verdict in judged} | gone | {b.build_id: b.draft_version for b in builds}


def drafts_of(builds: Sequence[EngineBuild], folders: Sequence[TrainingFolder]) -> dict[str, Path]:
    """Draft version -> folder with its weights: of a build, else where it was trained."""
    trained = {folder.draft_version: folder.path / "draft" for folder in folders if folder.digest and folder.draft_version}
    kept = {version: draft for version, draft in trained.items() if (draft / "model.safetensors").is_file()}
    return kept | {build.draft_version: Path(build.path) / "draft" for build in builds}


def _birth(build: EngineBuild) -> dict[str, Any]:
    """The draft's birth certificate; empty where it can't be read."""
    found = read_record(Path(build.path) / "draft" / "provenance.json")
    return found if "created_at" in found and "train_s" in found else {}


def _savings(config: TideConfig, since: float, until: float, bucket_s: float, history: Sequence[Deployment], versions: Mapping[str, str],
             drafts: Mapping[str, Path], trainings: Sequence[Trained]) -> Savings | None:
    first = next(iter(rest_of(history[0]).values()), "") if history else ""
    return find_savings(config, since, until, bucket_s, static=versions.get(first, ""), drafts=drafts,
                        training=[(t.ended, t.seconds) for t in trainings])


def _facts(config: TideConfig) -> dict[str, str]:
    birth = birth_certificate()
    packages = ", ".join(f"{name} {version}" for name, version in birth["packages"].items())
    return {"machine": birth["machine"], "python": birth["python"], "packages": packages, "revision": birth["git_sha"],
            "engine": f"{config.engine}, serving on {config.serve.device} ({config.serve.threads} threads), training on "
                      f"{config.training.device} ({config.training.threads} threads)",
            "drift": f"{config.drift.recent_s:.0f} s windows, {config.drift.min_steps} drafted steps, drop {config.drift.min_drop:.2f}",
            "training budget": f"{config.training.time_budget_s:.0f} s"}
