"""How replicas stand to a deployment: alive, serving it, with which trouble. Reads observed state; asks no replica."""

from __future__ import annotations

import time
from collections.abc import Mapping

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import Deployment, ObservedState
from tide_pipeline.deployment.record import read_observed, reporters

POLL_S = 0.2
ERROR_GRACE_S = 8.0                # a draft agent tries a build again after 5 s: only an error that outlives that counts

Digests = Mapping[str, str]        # build id -> digest of its draft


def live_replicas(config: TideConfig) -> dict[str, ObservedState]:
    """Those whose last report is fresh."""
    return fresh(read_observed(config.state.observed, config.target), config.rollout.heartbeat_s, time.time())


def find_replicas(config: TideConfig) -> list[str]:
    """Names of live replicas, in order. Where some reported once, they get one heartbeat's time to do it again."""
    give_up = time.monotonic() + config.rollout.heartbeat_s
    while not (live := live_replicas(config)) and reporters(config.state.observed, config.target) and time.monotonic() < give_up:
        time.sleep(POLL_S)
    return sorted(live)


def why_nobody(config: TideConfig) -> str:
    """Why no replica is live where some have reported; "" where none ever has."""
    names, seen = reporters(config.state.observed, config.target), read_observed(config.state.observed, config.target)
    if not names:
        return ""
    unread = ", ".join(name for name in names if name not in seen)
    told = f"; the reports of {unread} can't be read by this version: run one version everywhere" if unread else ""
    return (f"replicas of {config.target} have reported, and none has for {config.rollout.heartbeat_s:.0f} s: nobody could be watched, "
            f"look at `tide status`{told}")


def fresh(replicas: Mapping[str, ObservedState], heartbeat_s: float, now: float) -> dict[str, ObservedState]:
    """A report from the future is none: the clock was set back, and who is alive reports again."""
    return {name: state for name, state in replicas.items() if abs(now - state.at) <= heartbeat_s}


def has_applied(state: ObservedState, deployment: Deployment) -> bool:
    return state.deployment >= deployment.n and state.drafts == deployment.drafts_for(state.replica)


def other_bytes(state: ObservedState, deployment: Deployment, digests: Digests) -> str:
    """What a replica says it serves under a build's name that is not that build; "" when all is right."""
    for tag, build_id in state.drafts.items():
        known, found = digests.get(build_id, ""), state.draft_digests.get(tag, "")
        if known and build_id in deployment.drafts_for(state.replica).values() and found != known:
            return f"digest mismatch: {state.replica} serves {found[:12] or 'nothing'} as build {build_id}, recorded {known[:12]}"
    return ""


def trouble_of(name: str, state: ObservedState | None, deployment: Deployment, digests: Digests, now: float, *, heartbeat_s: float,
               timeout_s: float) -> str:
    """Why a replica that should serve the new draft speaks against it; "" when nothing does (yet)."""
    age = now - deployment.created_at
    if state is None or now - state.at > heartbeat_s:
        return f"{name} stopped reporting" if age > heartbeat_s or state is None else ""
    if state.deployment >= deployment.n and (wrong := other_bytes(state, deployment, digests)):
        return wrong
    if has_applied(state, deployment):
        return ""
    if state.error and state.at > deployment.created_at + ERROR_GRACE_S:
        return f"{name}: {state.error}"
    return f"{name} did not serve deployment {deployment.n} within {timeout_s:.0f} s" if age > timeout_s else ""
