"""MLflow's aliases follow what is served. Knows the registry and the record; decides nothing."""

from __future__ import annotations

import re

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import ANY_WORKLOAD, Deployment
from tide_pipeline.deployment.builds import load_build
from tide_pipeline.registry.registry import Registry
from tide_pipeline.rollout.history import CANARY

CHAMPION = "champion"


def follow_alias(config: TideConfig, registry: Registry, deployment: Deployment) -> dict[str, int]:
    """Point `champion` (and `champion-<workload>`) at the versions being served; returns alias -> version.

    A canary moves nothing, and a draft that was never registered is passed over. Raises RegistryError, BuildError.
    """
    moved: dict[str, int] = {}
    for tag, build_id in deployment.groups["rest"].items() if deployment.stage != CANARY else ():
        draft = registry.find(load_build(config.state.builds, config.target, build_id).draft_digest)
        if draft is None:
            continue
        alias = alias_name(tag)
        if registry.alias(alias) != draft.version:
            registry.set_alias(alias, draft.version)
        moved[alias] = draft.version
    return moved


def alias_name(tag: str) -> str:
    """MLflow takes letters, digits, dashes and underscores."""
    return CHAMPION if tag == ANY_WORKLOAD else f"{CHAMPION}-{re.sub(r'[^A-Za-z0-9_-]', '-', tag)}"
