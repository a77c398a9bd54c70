"""MLflow's alias `challenger`: the version that is before the gate, proposed, or on its way to every replica. Decides nothing about drafts.

    a draft was trained and registered     its version gets the alias
    the gate, or its digest, refused it    the alias goes
    it is proposed or rolled out           the alias stands on what the record brings
    served everywhere, back or aborted     the alias goes
    a person's request waits (alias.py)    the alias stays there, whatever is trained meanwhile
The alias alone asks for nothing: a request is the tag `request = waiting`. Whoever looks next finishes what a died process began.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import Deployment
from tide_pipeline.deployment.builds import list_builds, read_build
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.errors import BuildError, RegistryAway, RegistryError
from tide_pipeline.registry.registry import Registry
from tide_pipeline.rollout.history import PROPOSED, is_under_way, new_build_of

CHALLENGER = "challenger"
CHALLENGED_AT = "challenged_at"                        # Unix seconds; rollouts of the version before it are another story
REQUEST, REQUESTED_AT, WAITING, REFUSED = "request", "requested_at", "waiting", "refused"
GATE = "gate"                                          # tag of a version: passed or refused


def challenge(registry: Registry, version: int) -> int:
    """A registered version goes before the gate. Returns where the alias stands: on a waiting request it stays. Raises RegistryError."""
    standing = registry.alias(CHALLENGER)
    if standing is not None and standing != version and _is_waiting(_tags(registry, standing)):
        return standing
    registry.tag(version, {CHALLENGED_AT: time.time()})       # before the alias: a death between the two costs a tag
    registry.set_alias(CHALLENGER, version)
    return version


def step_down(registry: Registry, version: int) -> None:
    """A version that was refused is no challenger any more; another one that is stays. Raises RegistryError."""
    if registry.alias(CHALLENGER) == version and not _is_waiting(_tags(registry, version)):
        registry.drop_alias(CHALLENGER)


def follow_challenger(config: TideConfig, registry: Registry, deployment: Deployment, standing: int | None) -> None:
    """Put the alias, which stands on `standing`, where the record says. Raises RegistryError."""
    brought = _brought(config, registry, deployment)
    if standing is not None and (standing == brought or not _is_over(config, deployment, _tags(registry, standing))):
        return
    if brought is not None:
        registry.tag(brought, {CHALLENGED_AT: deployment.created_at})
        registry.set_alias(CHALLENGER, brought)
    elif standing is not None:
        registry.drop_alias(CHALLENGER)


def _brought(config: TideConfig, registry: Registry, deployment: Deployment) -> int | None:
    """The version that is proposed or being rolled out; None when nothing is, or nobody registered it."""
    if not is_under_way(deployment) and deployment.stage != PROPOSED:
        return None
    with contextlib.suppress(BuildError):
        draft = registry.find(read_build(config.state.builds, config.target, new_build_of(deployment)).draft_digest)
        return draft.version if draft is not None else None
    return None


def _is_over(config: TideConfig, deployment: Deployment, tags: Mapping[str, str]) -> bool:
    """Whether a version's time as challenger has ended: refused, served, or brought by a rollout that has ended."""
    if _is_waiting(tags):
        return False
    if tags.get(GATE) == REFUSED or tags.get(REQUEST, "").startswith(REFUSED):
        return True
    try:
        builds = {b.build_id for b in list_builds(config.state.builds, config.target) if b.draft_digest == tags.get("digest")}
        since = max(float(tags.get(name, 0.0)) for name in (CHALLENGED_AT, REQUESTED_AT))
        return bool(builds & set(deployment.groups["rest"].values())) or any(
            new_build_of(d) in builds for d in DeploymentRecord(config.state.deployments, config.target).history()
            if d.created_at >= since)
    except (OSError, ValueError, TypeError):               # a file that can't be read: the alias stays, serving does not hang on it
        return False


def _is_waiting(tags: Mapping[str, str]) -> bool:
    return tags.get(REQUEST) == WAITING


def _tags(registry: Registry, version: int) -> Mapping[str, str]:
    """{} for a version that is none of ours: somebody may put an alias anywhere."""
    try:
        return registry.get(version).tags
    except RegistryAway:
        raise
    except RegistryError:
        return {}
