"""Asset live_draft as an event, for a change of what is served that no run of the asset told: approved, by hand, back, a sensor's.

Knows the deployment record and the asset's last materialization, which says what was told: no cursor.
"""

from __future__ import annotations

import contextlib
import functools
import time

import dagster as dg

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import ANY_WORKLOAD, Deployment
from tide_pipeline.defs.keys import key_of
from tide_pipeline.deployment.builds import read_build
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.errors import BuildError
from tide_pipeline.rollout.history import build_serving, rest_of

LIVE_DRAFT = "live_draft"
OWN_S = 30.0                       # a run of live_draft that still lives has told by then, with how long its stages took


def untold(instance: dg.DagsterInstance, config: TideConfig, latest: Deployment | None) -> list[dg.AssetMaterialization]:
    """The last change of what is served, when nobody told it; what the engine ships is no change."""
    if latest is None or (change := _last_change(config, latest.n)) is None or time.time() - change[1].created_at < OWN_S:
        return []
    before, after = change
    told = instance.get_latest_materialization_event(key_of(LIVE_DRAFT))
    metadata = told.asset_materialization.metadata if told is not None and told.asset_materialization is not None else {}
    n = metadata["deployment"].value if "deployment" in metadata else 0
    if isinstance(n, int) and after.n <= n <= latest.n:    # the change, or a later record that serves the same
        return []
    return [_event(config, before, after)]


@functools.lru_cache(maxsize=8)
def _last_change(config: TideConfig, n: int) -> tuple[Deployment, Deployment] | None:
    """The newest record up to n that serves other drafts than the one before it, after that one. Records never change."""
    record = DeploymentRecord(config.state.deployments, config.target)
    with contextlib.suppress(FileNotFoundError):           # none is before the first
        after = record.read(n)
        while True:
            before = record.read(after.n - 1)
            if rest_of(before) != rest_of(after):
                return before, after
            after = before
    return None


def _event(config: TideConfig, before: Deployment, after: Deployment) -> dg.AssetMaterialization:
    workload = after.workload or _changed(before, after)
    build_id = build_serving(rest_of(after), workload)
    version = ""
    with contextlib.suppress(BuildError):                  # an old one that maintenance removed
        version = read_build(config.state.builds, config.target, build_id).draft_version if build_id else ""
    return dg.AssetMaterialization(key_of(LIVE_DRAFT), description=f"deployment {after.n} by {after.who}", metadata={
        "deployment": after.n, "serves": workload, "build_id": build_id, "draft_version": version, "reason": after.reason})


def _changed(before: Deployment, after: Deployment) -> str:
    """The workload whose draft is another; of several the one for everybody, or the first."""
    old, new = rest_of(before), rest_of(after)
    tags = sorted(tag for tag in old.keys() | new.keys() if old.get(tag) != new.get(tag))
    return ANY_WORKLOAD if ANY_WORKLOAD in tags else tags[0]
