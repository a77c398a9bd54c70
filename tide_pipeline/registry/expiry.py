"""Let go of drafts in MLflow: the version and the bytes. The run stays, with parameters, curve and birth certificate. Decides nothing.

    1  tag tide.expired = begun     the run is never taken up again for the same draft
    2  the version goes             from now on nobody can ask for it
    3  model.safetensors and config.json go
    4  tag tide.expired = when
A death between two of them leaves `begun`: whoever looks next ends it, or takes the tag back where the version is wanted again.
The certificate stays because a draft's children are found by it when windows are deleted (`tide signals delete`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tide_pipeline.models.checkpoint import FILES
from tide_pipeline.registry.client import tolerating
from tide_pipeline.registry.registry import RegisteredDraft, Registry
from tide_pipeline.registry.run import ARTIFACTS, EXPIRED

if TYPE_CHECKING:
    from mlflow.entities import Run

BEGUN = "begun"


@dataclass(frozen=True)
class Kept:
    """What MLflow holds of a target."""

    drafts: tuple[RegisteredDraft, ...] = ()               # oldest first
    unfinished: tuple[str, ...] = ()                       # runs that a death left half let go of, no version any more
    orphans: tuple[str, ...] = ()                          # runs whose draft was never made a version, old enough to be given up
    begun: frozenset[str] = field(default_factory=frozenset)           # runs with a version that were about to be let go of


def look(registry: Registry, *, born_before: float) -> Kept:
    """Versions that are none of ours, and their runs, are left out. `born_before`: Unix seconds. Raises RegistryError."""
    drafts, foreign = _versions(registry)
    owned, unfinished, orphans, begun = {draft.run_id for draft in drafts}, [], [], set()
    with registry.talking("read"):
        for run in _runs(registry):
            run_id, expired = run.info.run_id, run.data.tags.get(EXPIRED, "")
            if run_id in foreign:
                continue
            if expired == BEGUN:
                begun.add(run_id) if run_id in owned else unfinished.append(run_id)
            elif not expired and run_id not in owned and run.info.start_time / 1e3 < born_before:
                orphans.append(run_id)
    return Kept(drafts, tuple(unfinished), tuple(orphans), frozenset(begun))


def expire(registry: Registry, draft: RegisteredDraft, is_wanted: Callable[[RegisteredDraft], bool]) -> bool:
    """Let go of a version unless it is wanted by now. Returns whether it went. Raises RegistryError."""
    with registry.talking(f"removed of version {draft.version}"):
        registry.client.set_tag(draft.run_id, EXPIRED, BEGUN)
    if is_wanted(draft):                                   # asked after the tag, right before the version goes
        keep(registry, draft.run_id)
        return False
    with registry.talking(f"removed of version {draft.version}"), tolerating("RESOURCE_DOES_NOT_EXIST"):
        registry.client.delete_model_version(registry.name, str(draft.version))
    remove_bytes(registry, draft.run_id)
    return True


def remove_bytes(registry: Registry, run_id: str) -> None:
    """Of a run whose version is gone. Raises RegistryError."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    with registry.talking(f"removed of run {run_id}"):
        registry.client.set_tag(run_id, EXPIRED, BEGUN)
        place = get_artifact_repository(registry.client.get_run(run_id).info.artifact_uri, tracking_uri=registry.uri)
        stored = {file.path for file in place.list_artifacts(ARTIFACTS)}
        for name in FILES:
            if f"{ARTIFACTS}/{name}" in stored:
                place.delete_artifacts(f"{ARTIFACTS}/{name}")
        registry.client.set_tag(run_id, EXPIRED, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))


def keep(registry: Registry, run_id: str) -> None:
    """Take the tag back. Raises RegistryError."""
    with registry.talking(f"changed of run {run_id}"), tolerating("RESOURCE_DOES_NOT_EXIST"):
        registry.client.delete_tag(run_id, EXPIRED)


def _versions(registry: Registry) -> tuple[tuple[RegisteredDraft, ...], set[str]]:
    """Ours, oldest first, and the runs behind versions that somebody made of something else."""
    with registry.talking("read"):
        found = list(registry.versions(f"name = '{registry.name}'"))
        ours = sorted((registry.read(version) for version in found if registry.is_ours(version)), key=lambda draft: draft.version)
    return tuple(ours), {version.run_id for version in found if not registry.is_ours(version)}


def _runs(registry: Registry) -> Iterator[Run]:
    """Those that hold or held a draft of the target."""
    experiment, token = registry.client.get_experiment_by_name(f"tide/{registry.target}"), None
    while experiment is not None:
        page = registry.client.search_runs([experiment.experiment_id], f"tags.target = '{registry.target}'", max_results=500,
                                           page_token=token)
        yield from (run for run in page if "digest" in run.data.tags)
        token = page.token
        if not token:
            return

