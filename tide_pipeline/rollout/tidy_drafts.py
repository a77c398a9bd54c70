"""Which drafts in MLflow and which adaptations in training/ nobody needs any more, by [retention]; removes them. Knows no Dagster.

A version stays while it has any alias, waits as a request, is the draft of a build (tidy.py says which of those stay: served, in reach of
`tide rollback`, proposed, of the last week) or served by a replica, is used by a run, is younger than a week, among the newest, shipped
with the engine, or the parent of one of these. Of an adaptation its records stay, a few kB: the report, the stages and a look for drafts
that were trained on deleted windows read them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tide_pipeline.config import RetentionSettings, TideConfig
from tide_pipeline.deployment.builds import list_builds
from tide_pipeline.deployment.record import read_observed
from tide_pipeline.errors import BuildError, SettingsError
from tide_pipeline.provenance import read_record
from tide_pipeline.registry.expiry import expire, keep, look, remove_bytes
from tide_pipeline.registry.registry import RegisteredDraft, Registry
from tide_pipeline.registry.shipped import LABEL
from tide_pipeline.rollout.challenger import REQUEST, WAITING
from tide_pipeline.rollout.tidy import YOUNG_S

RECORDS = (".json", ".jsonl", ".toml")     # of an adaptation, what stays
UNFINISHED = ("resume.safetensors", "run.json")        # what a training goes on from; removed first, in its own order


@dataclass(frozen=True)
class InUse:
    """What Dagster's runs need that have not ended, or only just."""

    runs: frozenset[str] = frozenset()     # run ids, and those of the first attempts
    versions: frozenset[int] = frozenset()


@dataclass(frozen=True)
class TidiedDrafts:
    versions: tuple[int, ...] = ()         # that went
    given_up: int = 0                      # runs without a version whose bytes went
    kept: Mapping[str, int] | None = None  # why versions stayed -> how many; None where all stay by the settings
    adaptations: tuple[str, ...] = ()      # run ids whose weights and snapshots went
    freed_bytes: int = 0                   # of training/


def tidy_drafts(config: TideConfig, registry: Registry, in_use: InUse, now: float, *, only_look: bool = False) -> TidiedDrafts:
    """Remove what the settings let go of, or only say what that would be.

    Raises SettingsError; RegistryError, with what was begun left to the next call; BuildError, and nothing has gone from MLflow.
    """
    check_settings(config.retention)
    adaptations, freed = _tidy_training(config, in_use, only_look) if config.retention.training_keep else ((), 0)
    if not config.retention.drafts_keep:
        return TidiedDrafts(adaptations=adaptations, freed_bytes=freed)
    found = look(registry, born_before=now - YOUNG_S)
    why = why_kept(config, registry, found.drafts, in_use, now)
    gone = [draft for draft in found.drafts if draft.version not in why]
    given_up = [*found.unfinished, *found.orphans]
    if not only_look:
        for draft in found.drafts:
            if draft.run_id in found.begun and draft.version in why:   # wanted again since a death
                keep(registry, draft.run_id)
        gone = [draft for draft in gone if expire(registry, draft, lambda d: _is_asked_for(registry, d))]
        for run_id in given_up:
            remove_bytes(registry, run_id)
    return TidiedDrafts(tuple(draft.version for draft in gone), len(given_up), Counter(why.values()), adaptations, freed)


def check_settings(keep: RetentionSettings) -> None:
    for name in ("drafts_keep", "training_keep"):
        if getattr(keep, name) < 0:
            raise SettingsError(f"retention.{name} is {getattr(keep, name)}: say how many to keep, or 0 for all")


def why_kept(config: TideConfig, registry: Registry, drafts: Sequence[RegisteredDraft], in_use: InUse, now: float) -> dict[int, str]:
    """Version -> the first reason that keeps it. Raises RegistryError, BuildError."""
    named, built, observed = set(registry.aliases().values()), _built(config), read_observed(config.state.observed, config.target)
    served = {digest for seen in observed.values() for digest in seen.draft_digests.values()}
    newest = {draft.version for draft in drafts[-config.retention.drafts_keep:]}
    used = in_use.versions | _used_versions(config, in_use)
    rules = (("has an alias", lambda d: d.version in named), ("was asked for", lambda d: d.tags.get(REQUEST) == WAITING),
             ("is served", lambda d: d.digest in served), ("has a build", lambda d: d.digest in built),
             ("a run uses it", lambda d: d.version in used), ("is young", lambda d: d.created_at > now - YOUNG_S),
             ("is among the newest", lambda d: d.version in newest), ("was shipped", lambda d: d.tags.get("label") == LABEL))
    why = {draft.version: reason for draft in drafts for reason in [next((text for text, holds in rules if holds(draft)), "")] if reason}
    parents = {draft.tags.get("parent", "") for draft in drafts if draft.version in why}
    return why | {draft.version: "is a parent" for draft in drafts if draft.version not in why and draft.draft_version in parents}


def _is_asked_for(registry: Registry, draft: RegisteredDraft) -> bool:
    """What a person may have done since the look."""
    return draft.version in registry.aliases().values() or registry.get(draft.version).tags.get(REQUEST) == WAITING


def _built(config: TideConfig) -> set[str]:
    """Digests of the drafts of all builds."""
    try:
        return {build.draft_digest for build in list_builds(config.state.builds, config.target)}
    except (OSError, ValueError, TypeError) as error:
        raise BuildError(f"a build.json under {config.state.builds / config.target} can't be read ({error}), and its draft may be needed: "
                         "make that build again with `tide build`, or remove its folder") from error


def _used_versions(config: TideConfig, in_use: InUse) -> set[int]:
    """That the adaptations of these runs have registered or begun with."""
    found = (read_record(config.state.training / run_id / "registered.json").get("version") for run_id in in_use.runs)
    return {version for version in found if isinstance(version, int)}


# --- training/ -----------------------------------------------------------------------------------------------------

def _tidy_training(config: TideConfig, in_use: InUse, only_look: bool) -> tuple[tuple[str, ...], int]:
    """Of all targets together. Folders that Dagster did not make are a person's and stay."""
    folders = sorted((folder for folder in config.state.training.glob("*") if (folder / "request.json").is_file()), key=_last_written)
    old = folders[: -config.retention.training_keep]
    emptied, freed = [], 0
    for folder in old:
        if folder.name in in_use.runs or _is_only_copy(folder):
            continue
        heavy = sorted((file for file in folder.rglob("*") if file.is_file() and (file.suffix not in RECORDS or file.name in UNFINISHED)),
                       key=lambda file: UNFINISHED.index(file.name) if file.name in UNFINISHED else len(UNFINISHED))
        if heavy:
            emptied.append(folder.name)
            freed += sum(file.stat().st_size for file in heavy)
        if not only_look:
            for file in heavy:
                file.unlink(missing_ok=True)
    return tuple(emptied), freed


def _last_written(folder: Path) -> float:
    return max(file.stat().st_mtime for file in folder.glob("*.json"))


def _is_only_copy(folder: Path) -> bool:
    """A draft that was trained and never reached MLflow: re-executing its run, or `tide register`, still can."""
    return (folder / "draft" / "checkpoint.json").is_file() and not (folder / "registered.json").is_file()
