"""The deployment record: `deployments/<target>/<n>.json`, append-only. Knows desired and observed state, not engines.

The highest n is desired state. A number is created exclusively (a hard link), so of two writers one loses, reads again
and decides again. Observed state is one file per replica, rewritten in place.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tide_pipeline.contracts import Deployment, ObservedState, from_json
from tide_pipeline.errors import DeploymentConflict
from tide_pipeline.provenance import write_json


class DeploymentRecord:
    """Desired state of one target."""

    def __init__(self, deployments: Path, target: str) -> None:
        self.folder = deployments / target
        self.target = target

    def history(self) -> list[Deployment]:
        """Every record, oldest first."""
        numbered = sorted((int(p.stem), p) for p in self.folder.glob("*.json") if p.stem.isdecimal())
        return [from_json(Deployment, path.read_text()) for _, path in numbered]

    def latest(self) -> Deployment | None:
        numbers = [int(p.stem) for p in self.folder.glob("*.json") if p.stem.isdecimal()]
        return from_json(Deployment, (self.folder / f"{max(numbers):06d}.json").read_text()) if numbers else None

    def read(self, n: int) -> Deployment:
        """Record number n. Raises FileNotFoundError when there is none."""
        return from_json(Deployment, (self.folder / f"{n:06d}.json").read_text())

    def append(self, deployment: Deployment) -> Deployment:
        """Write number n, which must be the next one. Raises DeploymentConflict when somebody else wrote it first."""
        latest = self.latest()
        if deployment.n != (latest.n if latest else 0) + 1:
            raise DeploymentConflict(f"deployment {deployment.n} of {self.target} is not the next number: read the record again")
        try:
            write_json(self.folder / f"{deployment.n:06d}.json", dataclasses.asdict(deployment), exclusive=True)
        except FileExistsError as error:
            raise DeploymentConflict(f"deployment {deployment.n} of {self.target} was written by somebody else: "
                                     "read it and decide again") from error
        return deployment


def write_observed(observed: Path, state: ObservedState) -> None:
    """`observed/<target>/<replica>.json`, replaced whole."""
    write_json(observed / state.target / f"{state.replica}.json", dataclasses.asdict(state))


def read_observed(observed: Path, target: str) -> dict[str, ObservedState]:
    """By replica; a file that is being removed or can't be parsed is left out."""
    states = [_observed(path) for path in (observed / target).glob("*.json")]
    return {state.replica: state for state in states if state is not None}


def reporters(observed: Path, target: str) -> list[str]:
    """Replicas that ever reported, in order: also those whose file can't be parsed, which another version may have written."""
    return sorted(path.stem for path in (observed / target).glob("*.json"))


def read_replica(observed: Path, target: str, replica: str) -> ObservedState | None:
    """What one replica last reported; None when it never did, or its file can't be parsed."""
    return _observed(observed / target / f"{replica}.json")


def _observed(path: Path) -> ObservedState | None:
    try:
        return from_json(ObservedState, path.read_text())
    except (FileNotFoundError, ValueError, TypeError):
        return None
