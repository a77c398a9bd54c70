"""Which trainings a period had, what each cost, and what for. Knows folders of trainings and certificates of drafts; knows no lake."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tide_pipeline.report.data import Drift, Trained
from tide_pipeline.report.parts import DASH
from tide_pipeline.report.training_folder import TrainingFolder, number

Birth = Mapping[str, Any]          # a draft's certificate


@dataclass(frozen=True)
class Trainings:
    """Those that ended in the period, or were last heard of in it."""

    found: Sequence[Trained]                               # oldest first
    curves: Mapping[str, Sequence[Mapping[str, Any]]]      # draft version -> points, oldest first
    untimed: int                                           # left no record of their seconds, and are not among the found


def trainings_of(folders: Sequence[TrainingFolder], births: Mapping[str, Birth], since: float, until: float) -> Trainings:
    """`births`: of the builds that are left, by draft version; they add what was trained in a folder elsewhere."""
    drafts = [(version_of(folder, births), _birth_of(folder, births)) for folder in folders if folder.digest]
    known = {folder.digest for folder in folders}
    drafts += [(version, birth) for version, birth in births.items() if birth.get("digest") not in known and "curve" in birth]
    drafts = [(version, birth) for version, birth in drafts if since <= birth["created_at"] <= until]
    drafts.sort(key=lambda draft: float(draft[1]["created_at"]))
    others = [folder for folder in folders if not folder.digest and since <= folder.last_heard <= until]
    trained = [*(_with_draft(version, birth) for version, birth in drafts), *(_without(f) for f in others if f.least_s > 0)]
    return Trainings(sorted(trained, key=lambda t: t.ended), {version: birth["curve"] for version, birth in drafts if "curve" in birth},
                     sum(f.least_s <= 0 for f in others))


def version_of(folder: TrainingFolder, births: Mapping[str, Birth]) -> str:
    """What its draft is called; "" without one."""
    built = next((version for version, birth in births.items() if folder.digest and birth.get("digest") == folder.digest), "")
    return (folder.draft_version or built or folder.digest[:12]) if folder.digest else ""


def drifts_of(folders: Sequence[TrainingFolder], births: Mapping[str, Birth], recent_s: float, since: float, until: float) -> list[Drift]:
    """What trainings were launched for, oldest first. An episode's windows begin `recent_s` before its first verdict."""
    found = []
    for folder in folders:
        began = number(folder.request, "focus_since")
        if began and since <= began + recent_s <= until:
            asked = folder.request
            found.append(Drift(began + recent_s, str(asked.get("workload", "")), version_of(folder, births) or DASH,
                               str(asked.get("reason", ""))))
    return sorted(found, key=lambda d: d.at)


def _birth_of(folder: TrainingFolder, births: Mapping[str, Birth]) -> Birth:
    """The certificate; where it is damaged what the build has of it, or what the checkpoint says."""
    built = next((birth for birth in births.values() if birth.get("digest") == folder.digest), None)
    done = folder.checkpoint
    return folder.certificate or built or {
        "created_at": folder.last_heard, "train_s": number(done, "train_s"), "processes": folder.devices, "rows": done.get("num_rows", 0),
        "start_acceptance_length": number(folder.progress, "start_acceptance"), "acceptance_length": number(done, "acceptance_length")}


def _with_draft(version: str, birth: Birth) -> Trained:
    ended, train_s, processes = number(birth, "created_at"), number(birth, "train_s"), max(1.0, number(birth, "processes"))
    return Trained(version, ended, train_s * processes, int(number(birth, "rows")), number(birth, "start_acceptance_length"),
                   number(birth, "acceptance_length"), ended - train_s)


def _without(folder: TrainingFolder) -> Trained:
    stage = str(folder.progress.get("stage") or "loading")
    return Trained("", folder.last_heard, folder.least_s * folder.devices, 0, number(folder.progress, "start_acceptance"), 0.0,
                   folder.last_heard - folder.least_s, f"{folder.run}, last seen {stage}")
