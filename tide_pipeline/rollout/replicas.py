"""Which replicas are alive, and whether they serve what they should. Reads observed state; asks no replica."""

from __future__ import annotations

import time
from collections.abc import Collection

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import Deployment, EngineBuild, ObservedState
from tide_pipeline.deployment.record import read_observed

POLL_S = 0.2
ERROR_GRACE_S = 8.0                # a draft agent tries a build again after 5 s: only an error that outlives that counts


def live_replicas(config: TideConfig) -> dict[str, ObservedState]:
    """Those whose last report is fresh."""
    oldest = time.time() - config.rollout.heartbeat_s
    return {name: state for name, state in read_observed(config.state.observed, config.target).items() if state.at >= oldest}


def find_replicas(config: TideConfig) -> list[str]:
    """Names of live replicas, in order. Where some reported once, they get one heartbeat's time to do it again."""
    give_up = time.monotonic() + config.rollout.heartbeat_s
    while not (live := live_replicas(config)) and read_observed(config.state.observed, config.target) and time.monotonic() < give_up:
        time.sleep(POLL_S)
    return sorted(live)


def serves(state: ObservedState, deployment: Deployment, build: EngineBuild) -> bool:
    """Whether a replica has applied this deployment (or a later one) and holds the new build with the right bytes."""
    wanted = deployment.drafts_for(state.replica)
    right_bytes = all(state.draft_digests.get(tag) == build.draft_digest for tag, build_id in wanted.items() if build_id == build.build_id)
    return state.deployment >= deployment.n and state.drafts == wanted and right_bytes


def wait_until_served(config: TideConfig, deployment: Deployment, build: EngineBuild, replicas: Collection[str]) -> str:
    """"" when every replica serves the deployment, else which one does not and why. Waits at most `rollout.max_bake_s`."""
    give_up = time.monotonic() + config.rollout.max_bake_s
    while True:
        live = live_replicas(config)
        late = [name for name in sorted(replicas) if name not in live or not serves(live[name], deployment, build)]
        if not late:
            return ""
        failed = [f"{name}: {live[name].error}" for name in late if name in live and live[name].error
                  and live[name].at > deployment.created_at + ERROR_GRACE_S]
        if failed:
            return "; ".join(failed)
        if time.monotonic() > give_up:
            silent = [name for name in late if name not in live]
            return (f"{', '.join(late)} did not serve deployment {deployment.n} within {config.rollout.max_bake_s:.0f} s"
                    + (f" ({', '.join(silent)} stopped reporting)" if silent else ""))
        time.sleep(POLL_S)
