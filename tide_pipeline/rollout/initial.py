"""The first deployment: the draft an engine ships with. Knows builds and the record."""

from __future__ import annotations

from tide_pipeline.build.engine import build_engine
from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import ANY_WORKLOAD, Deployment
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.engine_spec import load_engine_spec
from tide_pipeline.models.checkpoint import digest_draft
from tide_pipeline.registry.shipped import LABEL
from tide_pipeline.rollout.history import STABLE, decide_and_append, following

REASON = "shipped with the engine"


def ensure_initial(config: TideConfig, who: str = "tide") -> Deployment | None:
    """Build the shipped champion and write deployment 1 where there is none; None for an engine that ships no draft."""
    record = DeploymentRecord(config.state.deployments, config.target)
    if (latest := record.latest()) is not None:
        return latest
    champion = load_engine_spec(config.engine_dir).champion
    folder = config.engine_dir / champion
    if not champion or not folder.is_dir():
        return None
    build = build_engine(config, folder, f"{LABEL}-{digest_draft(folder)[:8]}")

    def decide(latest: Deployment | None) -> Deployment:
        return latest or following(latest, config.target, {"rest": {ANY_WORKLOAD: build.build_id}}, (), STABLE, who, REASON)

    return decide_and_append(record, decide)
