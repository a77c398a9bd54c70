"""What a build for TensorRT-LLM is made of beyond the embedded one's: model.yaml and a birth certificate. Knows no folders, no GPU.

    build.json  draft/  settings.toml  provenance.json
    model_repository/<target>/config.pbtxt  1/model.py  1/model.yaml
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import EngineBuild
from tide_pipeline.engine.trtllm.facts import table_for
from tide_pipeline.engine.trtllm.model_yaml import render_model_yaml
from tide_pipeline.engine.trtllm.options import llm_arguments
from tide_pipeline.engine_spec import EngineSpec
from tide_pipeline.provenance import birth_certificate, digest_bytes, digest_file


def identity(config: TideConfig, spec: EngineSpec) -> str:
    """What tells two builds of one draft apart: version line and arguments, without the places of target and draft."""
    table = table_for(config.serve.trtllm)
    return f"trtllm {table.line} {digest_bytes(json.dumps(llm_arguments(spec, config, table, draft='draft'), sort_keys=True).encode())}"


def model_yaml(config: TideConfig, spec: EngineSpec, draft: Path) -> str:
    """For the version line of the serving container, with the snapshot of the target in the engine's folder. Raises SettingsError."""
    table = table_for(config.serve.trtllm)
    model = str(config.engine_dir / spec.model)
    return render_model_yaml(llm_arguments(spec, config, table, draft=str(draft), model=model), table.line)


def certificate(folder: Path, config: TideConfig, spec: EngineSpec, build: EngineBuild) -> dict[str, Any]:
    """Of everything the folder holds, file by file: `load_build` verifies these digests."""
    files = {str(path.relative_to(folder)): digest_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    return birth_certificate(
        build_id=build.build_id, target={"repo": spec.repo, "revision": spec.revision, "engine_digest": build.engine_digest},
        draft={"version": build.draft_version, "digest": build.draft_digest}, trtllm=table_for(config.serve.trtllm).line,
        capture_layers=list(spec.capture_layers), files=files)
