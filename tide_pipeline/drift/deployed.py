"""Which draft version should serve which workload, and since when. Reads the deployment record and the builds it names."""

from __future__ import annotations

from dataclasses import dataclass, field

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import ANY_WORKLOAD
from tide_pipeline.deployment.builds import list_builds
from tide_pipeline.deployment.record import DeploymentRecord


@dataclass(frozen=True, slots=True)
class Deployed:
    """Desired state in terms of draft versions."""

    versions: dict[str, str] = field(default_factory=dict)             # workload tag or "*" -> draft version
    since: dict[str, float] = field(default_factory=dict)              # draft version -> first deployed, Unix seconds

    def version_of(self, workload: str) -> str | None:
        return self.versions.get(workload, self.versions.get(ANY_WORKLOAD))


def read_deployed(config: TideConfig) -> Deployed:
    """Empty where nothing was deployed through the record."""
    history = DeploymentRecord(config.state.deployments, config.target).history()
    if not history:
        return Deployed()
    builds = {build.build_id: build for build in list_builds(config.state.builds, config.target)}
    since: dict[str, float] = {}
    for deployment in history:
        for group in deployment.groups.values():
            for build_id in group.values():
                if build_id in builds:
                    since.setdefault(builds[build_id].draft_version, deployment.created_at)
    serving = history[-1].groups.get("rest", {})
    return Deployed({tag: builds[build_id].draft_version for tag, build_id in serving.items() if build_id in builds}, since)
