"""Append to the deployment record, and read what was served before. Knows records; no builds, no replicas."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tide_pipeline.contracts import Deployment
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.errors import DeploymentConflict

STABLE, CANARY, ROLLED_BACK = "stable", "canary", "rolled_back"
ATTEMPTS = 5

Drafts = dict[str, str]            # workload tag -> build id


def decide_and_append(record: DeploymentRecord, decide: Callable[[Deployment | None], Deployment]) -> Deployment:
    """Append what `decide` makes of the latest record; read again and decide again when somebody else was faster.

    `decide` may give back the latest record itself: then nothing has to be written.
    """
    for attempt in range(ATTEMPTS):
        latest = record.latest()
        wanted = decide(latest)
        if latest is not None and wanted.n == latest.n:
            return latest
        try:
            return record.append(wanted)
        except DeploymentConflict:
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


def next_n(latest: Deployment | None) -> int:
    return latest.n + 1 if latest else 1


def rest_of(latest: Deployment | None) -> Drafts:
    """What is served outside of any canary."""
    return dict(latest.groups["rest"]) if latest else {}


def served_states(history: Sequence[Deployment]) -> list[Drafts]:
    """What was stably served, oldest first; the last one counts now. What was rolled back from is no longer in it."""
    states: list[Drafts] = [rest_of(history[0])] if history else []
    for deployment in history:
        rest = rest_of(deployment)
        if deployment.stage == STABLE and states[-1] != rest:
            states.append(rest)
        if deployment.stage == ROLLED_BACK:
            while states and states[-1] != rest:
                states.pop()
            states = states or [rest]
    return states
