"""MLflow's aliases follow what is served; one that somebody moved is put back and taken as a request. Decides nothing about drafts.

    champion, champion-<workload>   the version that is served, as the deployment record says
    challenger                      the version on its way there (challenger.py), or that a person asked for by moving one of them
    mark followed.<alias>           where this module put an alias last: an alias that stands elsewhere was moved by somebody else
    tags request, requested_at      of a version that was asked for: waiting, then what became of it
    tag requested_for               the workload whose alias was moved; "*" for champion itself
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import ANY_WORKLOAD, Deployment
from tide_pipeline.deployment.builds import read_build
from tide_pipeline.errors import RegistryError
from tide_pipeline.registry.registry import RegisteredDraft, Registry
from tide_pipeline.rollout.challenger import CHALLENGER, REQUEST, REQUESTED_AT, WAITING, follow_challenger
from tide_pipeline.rollout.history import is_under_way

CHAMPION = "champion"
REQUESTED_FOR = "requested_for"
FOLLOWED = "followed."


@dataclass(frozen=True)
class Followed:
    """What was done: alias -> version served, and alias -> version that somebody had moved it to, or why that was refused."""

    champions: dict[str, int] = field(default_factory=dict)
    requested: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """A version that waits to be judged because somebody moved an alias to it."""

    version: int
    workload: str
    requested_at: str              # makes a second request of the same version another one


def follow_alias(config: TideConfig, registry: Registry, deployment: Deployment) -> Followed:
    """Put every alias where the record says. During a rollout no champion moves, and a draft that was never registered is passed over.

    Raises RegistryError, BuildError.
    """
    found, aliases = Followed(), registry.aliases()
    follow_challenger(config, registry, deployment, aliases.get(CHALLENGER))
    if is_under_way(deployment):
        return found
    marks = registry.marks()
    for tag, build_id in deployment.groups["rest"].items():
        draft = registry.find(read_build(config.state.builds, config.target, build_id).draft_digest)
        if draft is None:
            continue
        alias = alias_name(tag)
        moved_to = _moved_by_somebody(alias, aliases, marks, draft.version)
        if moved_to is not None:
            _ask_for(registry, alias, tag, moved_to, found)
        if aliases.get(alias) != draft.version:
            registry.set_alias(alias, draft.version)
        if marks.get(FOLLOWED + alias) != str(draft.version):          # after the alias: a death between the two costs a second look
            registry.mark(FOLLOWED + alias, str(draft.version))
        found.champions[alias] = draft.version
    return found


def waiting_request(registry: Registry) -> Request | None:
    """The latest one: an older one may wait for a run that died. Raises RegistryError."""
    waiting = registry.having(REQUEST, WAITING)
    if not waiting:
        return None
    asked = max(waiting, key=lambda draft: draft.tags.get(REQUESTED_AT, ""))
    return Request(asked.version, asked_workload(asked), asked.tags.get(REQUESTED_AT, ""))


def asked_workload(draft: RegisteredDraft) -> str:
    """What a version is judged on: the workload whose alias was moved to it, else the one that it was trained for."""
    asked = draft.tags.get(REQUESTED_FOR, "") if draft.tags.get(REQUEST) == WAITING else ""
    return asked if asked not in ("", ANY_WORKLOAD) else draft.tags.get("workload", "default")


def answer_request(registry: Registry, version: int, answer: str) -> None:
    """Write down what became of a version that was asked for; of one that nobody asked for, nothing. Raises RegistryError."""
    if REQUEST in registry.get(version).tags:
        registry.tag(version, {REQUEST: answer})


def alias_name(tag: str) -> str:
    """MLflow takes letters, digits, dashes and underscores."""
    return CHAMPION if tag == ANY_WORKLOAD else f"{CHAMPION}-{re.sub(r'[^A-Za-z0-9_-]', '-', tag)}"


def _moved_by_somebody(alias: str, aliases: Mapping[str, int], marks: Mapping[str, str], served: int) -> int | None:
    """Where to; None when it stands where it was put, lags behind a rollout, or is gone."""
    now, put = aliases.get(alias), marks.get(FOLLOWED + alias)
    return now if now is not None and put is not None and str(now) != put and now != served else None


def _ask_for(registry: Registry, alias: str, tag: str, version: int, found: Followed) -> None:
    """Before the alias goes back: a death between the two finds it moved again. A version that can't be read is refused."""
    try:
        registry.get(version)
        registry.tag(version, {REQUESTED_FOR: tag, REQUEST: WAITING, REQUESTED_AT: f"{time.time():.3f}"})
        registry.set_alias(CHALLENGER, version)
        found.requested[alias] = version
    except RegistryError as error:
        found.refused[alias] = str(error)
        with contextlib.suppress(RegistryError):
            registry.tag(version, {REQUEST: f"refused: {error}"})
