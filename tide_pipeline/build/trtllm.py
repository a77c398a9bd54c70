"""What a build for TensorRT-LLM is made of beyond the embedded one's: model.yaml, draft lengths, a birth certificate. Knows no GPU.

    build.json  draft/  settings.toml  schedule.json (if draft lengths were learned)  provenance.json
    model_repository/<target>/config.pbtxt  1/model.py  1/model.yaml
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tide_pipeline.build.schedule import learn_schedule
from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import EngineBuild
from tide_pipeline.engine.trtllm.facts import table_for
from tide_pipeline.engine.trtllm.model_yaml import render_model_yaml
from tide_pipeline.engine.trtllm.options import draft_length, llm_arguments
from tide_pipeline.engine_spec import EngineSpec
from tide_pipeline.errors import LakeError
from tide_pipeline.provenance import birth_certificate, digest_bytes, digest_file


@dataclass(frozen=True, slots=True)
class DraftLengths:
    """By batch size, as {largest batch: length}; {} is one length for all. `learned` says from what, `why` says it in words."""

    schedule: Mapping[int, int]
    why: str
    learned: Mapping[str, Any] | None = None


def draft_lengths(config: TideConfig, spec: EngineSpec, draft_version: str) -> DraftLengths:
    """By hand before learned before one for all; never what the version line can't do. A lake that can't be read teaches nothing."""
    line, by_hand = table_for(config.serve.trtllm), dict(config.speculation.draft_schedule)
    if by_hand:
        return DraftLengths(by_hand, "set by hand in speculation.draft_schedule")
    if not line.names["one_model_length_control"]:
        return DraftLengths({}, f"one for every batch: TensorRT-LLM {line.line} can't change it (`tide engines schedule` says up to which "
                                "batch size drafts pay)")
    try:
        found = learn_schedule(config, spec, time.time(), version=draft_version)
    except LakeError as error:
        return DraftLengths({}, f"one for every batch, as none were learned: {error}")
    whose = "its own survival" if found.is_own else f"the survival of {found.draft_version}: build again once this draft was served"
    why = f"learned from {found.drafted_steps} drafted steps since {found.origin()['survival_since']}, by {whose}"
    return DraftLengths(found.schedule if set(found.schedule.values()) != {draft_length(spec, config)} else {}, why, found.origin())


def identity(config: TideConfig, spec: EngineSpec, schedule: Mapping[int, int]) -> str:
    """What tells two builds of one draft apart: version line and arguments, without the places of target and draft."""
    table = table_for(config.serve.trtllm)
    arguments = llm_arguments(spec, config, table, draft="draft", schedule=schedule or None)
    return f"trtllm {table.line} {digest_bytes(json.dumps(arguments, sort_keys=True).encode())}"


def model_yaml(config: TideConfig, spec: EngineSpec, draft: Path, schedule: Mapping[int, int]) -> str:
    """For the version line of the serving container, with the snapshot of the target in the engine's folder. Raises SettingsError."""
    table = table_for(config.serve.trtllm)
    model = str(config.engine_dir / spec.model)
    arguments = llm_arguments(spec, config, table, draft=str(draft), model=model, schedule=schedule or None)
    return render_model_yaml(arguments, table.line)


def certificate(folder: Path, config: TideConfig, spec: EngineSpec, build: EngineBuild, lengths: DraftLengths) -> dict[str, Any]:
    """Of everything the folder holds, file by file: `load_build` verifies these digests."""
    files = {str(path.relative_to(folder)): digest_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    return birth_certificate(
        build_id=build.build_id, target={"repo": spec.repo, "revision": spec.revision, "engine_digest": build.engine_digest},
        draft={"version": build.draft_version, "digest": build.draft_digest}, trtllm=table_for(config.serve.trtllm).line,
        capture_layers=list(spec.capture_layers), files=files,
        draft_lengths={"schedule": {str(batch): length for batch, length in lengths.schedule.items()}, "why": lengths.why,
                       "learned": lengths.learned})
