"""Everything there is to see of a rollout at one moment: stage, replicas, versions, what comes next and why. Reads; draws nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import Deployment
from tide_pipeline.deployment.builds import list_builds
from tide_pipeline.deployment.record import read_observed
from tide_pipeline.rollout.drive import Driver
from tide_pipeline.rollout.history import is_under_way
from tide_pipeline.rollout.replicas import has_applied


@dataclass(frozen=True)
class ReplicaView:
    """One replica. `state`: serving, behind (not yet what it should), silent, or failing with `error`."""

    name: str
    group: str                     # "new" or "old" during a rollout, else ""
    deployment: int                # that it has applied
    versions: dict[str, str]       # workload tag -> draft version
    acceptance_length: float
    tokens_per_s: float
    age_s: float                   # of its last report
    state: str
    error: str


@dataclass(frozen=True)
class Overview:
    """One target."""

    target: str
    mode: str
    deployment: Deployment | None
    stage: str
    since_s: float                 # how long this record stands
    next: str                      # what would be done now, and why
    replicas: tuple[ReplicaView, ...]
    versions: dict[str, str]       # build id -> draft version


class Onlooker:
    """`look` again and again; a shard of the log is read once."""

    def __init__(self, config: TideConfig) -> None:
        self._config, self._driver = config, Driver(config, "nobody")

    def look(self) -> Overview:
        config, now = self._config, time.time()
        latest = self._driver.record.latest()
        action = self._driver.look(latest)
        versions = {build.build_id: build.draft_version for build in list_builds(config.state.builds, config.target)}
        return Overview(config.target, config.rollout.mode, latest, latest.stage if latest else "nothing deployed",
                        max(0.0, now - latest.created_at) if latest else 0.0,
                        f"{action.kind}: {action.reason}" if is_under_way(latest) else action.reason,
                        self._replicas(latest, versions, now), versions)

    def _replicas(self, latest: Deployment | None, versions: dict[str, str], now: float) -> tuple[ReplicaView, ...]:
        views = []
        for name, seen in sorted(read_observed(self._config.state.observed, self._config.target).items()):
            age = now - seen.at
            state = ("silent" if age > self._config.rollout.heartbeat_s else "failing" if seen.error
                     else "serving" if latest is None or has_applied(seen, latest) else "behind")
            group = ("new" if name in latest.canary_replicas else "old") if latest is not None and is_under_way(latest) else ""
            views.append(ReplicaView(name, group, seen.deployment, {tag: versions.get(b, b) for tag, b in seen.drafts.items()},
                                     seen.acceptance_length, seen.tokens_per_s, age, state, seen.error))
        return tuple(views)
