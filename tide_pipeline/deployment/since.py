"""Since when a replica serves what it does, and what the gate promised of it: read off the record's numbers. Knows no engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tide_pipeline.contracts import Deployment
from tide_pipeline.deployment.record import DeploymentRecord

LOOK_BACK = 500                    # records: a draft that is older than these looks as old as the oldest of them


@dataclass(frozen=True, slots=True)
class Since:
    """Of one workload tag's draft."""

    at: float                      # Unix seconds of the record from which on every record names it
    first_position: float = 0.0    # accepted first draft tokens in the gate, on held-out windows; 0 where no gate was asked


def served_since(record: DeploymentRecord, latest: Deployment, replica: str) -> dict[str, Since]:
    """By workload tag. Raises OSError, ValueError, TypeError for a record that can't be read."""
    wanted = latest.drafts_for(replica)
    found: dict[str, Since] = {}
    going_on = dict(wanted)
    for deployment in _backwards(record, latest):
        drafts = deployment.drafts_for(replica)
        going_on = {tag: build for tag, build in going_on.items() if drafts.get(tag) == build}
        if not going_on:
            break
        for tag in going_on:
            brought = {**deployment.groups["rest"], **deployment.groups.get("canary", {})}.get(tag)
            promised = deployment.first_position if deployment.workload == tag and brought == wanted[tag] else 0.0
            found[tag] = Since(deployment.created_at, promised or (found[tag].first_position if tag in found else 0.0))
    return found


def _backwards(record: DeploymentRecord, latest: Deployment) -> Iterator[Deployment]:
    yield latest
    for n in range(latest.n - 1, max(0, latest.n - LOOK_BACK), -1):
        yield record.read(n)
