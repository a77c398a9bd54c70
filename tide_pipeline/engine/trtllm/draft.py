"""Which draft a server is to be built with, and whether its files are what they should be. Loads no weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tide_pipeline.contracts import ANY_WORKLOAD, EngineBuild
from tide_pipeline.engine_spec import EngineSpec
from tide_pipeline.errors import BuildError
from tide_pipeline.models.checkpoint import checked_digest
from tide_pipeline.models.draft_files import check_draft


def one_draft(drafts: Mapping[str, EngineBuild]) -> EngineBuild | None:
    """The draft of all workloads. Raises BuildError for several: TensorRT-LLM has one per server."""
    if len({build.build_id for build in drafts.values()}) > 1:
        raise BuildError(f"TensorRT-LLM serves one draft per replica, the record names {len(drafts)} ({', '.join(sorted(drafts))}): "
                         "serve the workloads from different replicas, or one draft for all")
    return drafts.get(ANY_WORKLOAD) or next(iter(drafts.values()), None)


def checked_draft(build: EngineBuild, spec: EngineSpec) -> Path:
    """The draft's folder, every byte as recorded and fit for the target. Raises BuildError, CheckpointError, EngineMismatch."""
    folder = Path(build.path) / "draft"
    check_draft(folder, spec)
    checked_digest(folder, build)
    return folder
