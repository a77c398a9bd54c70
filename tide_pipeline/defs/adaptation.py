"""The folder of one adaptation, `training/<root run id>/`: what each step hands to the next. Knows JSON records, not Dagster assets.

    request.json      workload, reason, focus_since, since, until: what was asked for
    replays.json      what the champion does on held-out windows, for the gate
    draft/            the checkpoint, written by the trainer; draft/checkpoint.json says it is complete
    registered.json   the version MLflow gave it
    fetched/          its bytes as the registry gave them back
    build.json        the engine build; its verdict lies under reports/gate/
    marks.json        when each stage ended; stages.json: the seconds that each took, once the draft is live

A re-execution from failure in Dagster shares the root run id, so it finds what the first attempt finished.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import ANY_WORKLOAD, DraftCheckpoint, EngineBuild, from_dict
from tide_pipeline.deployment.builds import load_build
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.errors import BuildError
from tide_pipeline.provenance import write_json
from tide_pipeline.rollout.history import build_serving, rest_of

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Request:
    """What an adaptation was started for."""

    workload: str
    reason: str = ""
    focus_since: float = 0.0       # Unix seconds; 0 = every window of the workload counts
    drifted_at: float = 0.0        # when it was judged drifted; 0 where a person asked
    since: str = ""                # of a past period to train on (ISO 8601, UTC); "" is open
    until: str = ""


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """Paths and records of one adaptation."""

    folder: Path

    @classmethod
    def of(cls, config: TideConfig, run_id: str, root_run_id: str | None = None) -> Adaptation:
        return cls(config.state.training / (root_run_id or run_id))

    @property
    def draft(self) -> Path:
        return self.folder / "draft"

    @property
    def replays(self) -> Path:
        return self.folder / "replays.json"

    @property
    def fetched(self) -> Path:
        return self.folder / "fetched"

    def save(self, name: str, record: Any) -> None:
        """Write `<name>.json` from a dataclass."""
        write_json(self.folder / f"{name}.json", dataclasses.asdict(record))

    def load(self, cls: type[T], name: str) -> T:
        """Raises BuildError when the step that writes it has not run in this adaptation."""
        file = self.folder / f"{name}.json"
        try:
            return from_dict(cls, json.loads(file.read_text()))
        except FileNotFoundError as error:
            raise BuildError(f"{file} is not there: launch the job adapt_draft, or re-execute its run from the failed step; "
                             "a step alone has nothing to begin with") from error
        except (ValueError, TypeError) as error:
            raise BuildError(f"{file} can't be read ({error}): remove {self.folder} and launch adapt_draft again") from error

    def mark(self, **times: float) -> None:
        """Remember when a stage was reached (Unix seconds); the later of two attempts counts."""
        write_json(self.folder / "marks.json", {**self.marks(), **times})

    def marks(self) -> dict[str, float]:
        try:
            return {str(stage): float(at) for stage, at in json.loads((self.folder / "marks.json").read_text()).items()}
        except (FileNotFoundError, ValueError, TypeError, AttributeError):     # figures for people: nothing fails for them
            return {}

    def save_stages(self, seconds: dict[str, float]) -> None:
        write_json(self.folder / "stages.json", seconds)

    def request(self) -> Request:
        return self.load(Request, "request")

    def checkpoint(self) -> DraftCheckpoint:
        return self.load(DraftCheckpoint, "draft/checkpoint")

    def build(self) -> EngineBuild:
        return self.load(EngineBuild, "build")


def served_key(config: TideConfig, workload: str) -> str:
    """The workload tag itself where it has a draft of its own, else "*"."""
    latest = DeploymentRecord(config.state.deployments, config.target).latest()
    return workload if latest is not None and workload in latest.groups["rest"] else ANY_WORKLOAD


def served_build(config: TideConfig, workload: str) -> EngineBuild | None:
    """The build that serves a workload now; None when nothing is deployed, or no draft for it. Raises BuildError when it was altered."""
    latest = DeploymentRecord(config.state.deployments, config.target).latest()
    build_id = build_serving(rest_of(latest), workload)
    return load_build(config.state.builds, config.target, build_id) if build_id else None
