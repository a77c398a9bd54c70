"""The exported draft has the names, shapes, dtypes and config that TensorRT-LLM, SGLang and vLLM load.

The golden file is the list of facts on TensorRT-LLM (docs/engine.md) for the tiny target; change it only when the format changes.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from tests.helpers import write_tiny_build
from tide_pipeline.models.target import Target

GOLDEN = Path(__file__).parent / "draft_checkpoint.json"


def _tensors(folder: Path) -> dict[str, dict]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        slices = {name: file.get_slice(name) for name in sorted(file.keys())}
        return {name: {"shape": s.get_shape(), "dtype": s.get_dtype()} for name, s in slices.items()}


def test_exported_draft_matches_the_golden(tmp_path: Path, tiny_target: Target) -> None:
    want = json.loads(GOLDEN.read_text())
    folder = Path(write_tiny_build(tmp_path, tiny_target, vocabulary=torch.arange(0, 200, 2)).path) / "draft"
    assert _tensors(folder) == want["tensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("tide") == {"target": "tiny", "engine_digest": tiny_target.digest}
    assert config == want["config"]


def test_exported_draft_has_a_birth_certificate(tmp_path: Path, tiny_target: Target) -> None:
    build = write_tiny_build(tmp_path, tiny_target)
    certificate = json.loads((Path(build.path) / "draft" / "provenance.json").read_text())
    assert certificate["digest"] == build.draft_digest
    assert {"recipe", "created_at", "git_sha", "packages", "python", "machine"} <= certificate.keys()


def test_draft_ids_map_as_target_id_is_draft_id_plus_d2t(tmp_path: Path, tiny_target: Target) -> None:
    ids = torch.tensor([1, 2, 50, 256])
    folder = Path(write_tiny_build(tmp_path, tiny_target, vocabulary=ids).path) / "draft"
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        d2t, t2d = file.get_tensor("d2t"), file.get_tensor("t2d")
    assert (torch.arange(4) + d2t).tolist() == ids.tolist()
    assert t2d.nonzero().flatten().tolist() == ids.tolist()
