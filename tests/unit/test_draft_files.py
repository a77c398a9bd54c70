"""A draft's folder against a target's numbers: what would load silently and accept little is refused, with the fix."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu_engines import small_spec, write_gpu_draft
from tide_pipeline.engine_spec import EngineSpec
from tide_pipeline.errors import CheckpointError, EngineMismatch
from tide_pipeline.models.draft_files import check_draft, draft_of, read_header


@pytest.fixture
def spec(tmp_path: Path) -> EngineSpec:
    return small_spec(tmp_path)


def test_a_draft_that_fits(tmp_path: Path, spec: EngineSpec) -> None:
    folder = write_gpu_draft(tmp_path / "draft", spec)
    config = check_draft(folder, spec)
    assert draft_of(config, read_header(folder), spec.architecture).vocab_size == 100


def test_a_draft_may_use_the_targets_lm_head(tmp_path: Path, spec: EngineSpec) -> None:
    whole = write_gpu_draft(tmp_path / "whole", spec, {"draft_vocab_size": 300}, leave_out=("lm_head.weight", "d2t"))
    assert not draft_of(check_draft(whole, spec), read_header(whole), spec.architecture).has_lm_head
    with pytest.raises(CheckpointError, match=r"needs lm_head\.weight and d2t"):
        check_draft(write_gpu_draft(tmp_path / "cut", spec, leave_out=("d2t",)), spec)


@pytest.mark.parametrize(("changes", "message"), [
    ({"max_position_embeddings": 2048}, r"2048, a default left in by mistake, requests reach 4096: set it to the target's 8192"),
    ({"max_position_embeddings": 1024}, r"max_position_embeddings is 1024, requests reach 4096"),
    ({"hidden_size": 128}, r"hidden_size is 128, the target's is 64: .*tide train"),
    ({"vocab_size": 299}, r"vocab_size is 299, the target's is 300"),
    ({"draft_vocab_size": 301}, r"draft_vocab_size is 301"),
    ({"num_hidden_layers": 2}, r"1 decoder layer"),
    ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 6, 9]}}, r"reads layers \[2, 6, 9\].*capture_layers = \[2, 6, 9\]"),
    ({"tide": {"target": "small", "engine_digest": "00ff"}}, r"signals of engine 00ff.*recapture")])
def test_a_config_that_does_not_fit(changes: dict[str, Any], message: str, tmp_path: Path, spec: EngineSpec) -> None:
    folder = write_gpu_draft(tmp_path / "draft", spec, changes)
    with pytest.raises(EngineMismatch, match=message):
        check_draft(folder, spec)


@pytest.mark.parametrize(("changes", "message"), [
    ({"draft_vocab_size": None}, "no draft_vocab_size"), ({"architectures": ["LlamaForCausalLM"]}, "must be .'LlamaForCausalLMEagle3'.")])
def test_no_eagle3_draft_at_all(changes: dict[str, Any], message: str, tmp_path: Path, spec: EngineSpec) -> None:
    folder = write_gpu_draft(tmp_path / "draft", spec)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        check_draft(folder, spec)


def test_tensors_under_other_names_or_shapes(tmp_path: Path, spec: EngineSpec) -> None:
    with pytest.raises(CheckpointError, match=r"layers\.0\.hidden_norm\.weight must be called midlayer\.hidden_norm\.weight"):
        check_draft(write_gpu_draft(tmp_path / "old", spec, rename={"midlayer.hidden_norm.weight": "layers.0.hidden_norm.weight"}), spec)
    with pytest.raises(CheckpointError, match=r"lacks fc\.weight"):
        check_draft(write_gpu_draft(tmp_path / "cut", spec, leave_out=("fc.weight",)), spec)
    with pytest.raises(EngineMismatch, match=r"gate_proj\.weight is \(48, 64\).*say \(96, 64\)"):
        check_draft(write_gpu_draft(tmp_path / "other", spec, tensors_of={"intermediate_size": 48}), spec)


def test_damaged_files_and_pickles(tmp_path: Path, spec: EngineSpec) -> None:
    folder = write_gpu_draft(tmp_path / "draft", spec)
    whole = (folder / "model.safetensors").read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", b"\xff" * 64, b"\x02" + b"\x00" * 7 + b"[]"):
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="can't be read"):
            check_draft(folder, spec)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"but pytorch_model\.bin: a pickle runs code"):
        check_draft(folder, spec)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        check_draft(folder, spec)
    with pytest.raises(CheckpointError, match=r"config\.json missing"):
        check_draft(tmp_path, spec)


def test_it_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import tide_pipeline.build.check, tide_pipeline.cli.engines"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=500, cwd=Path(__file__).resolve().parents[2])
