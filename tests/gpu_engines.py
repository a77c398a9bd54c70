"""A small engine for TensorRT-LLM as a folder, and drafts that fit it or do not. Real files: nothing here is a stand-in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tide_pipeline.config import TideConfig, override
from tide_pipeline.engine_spec import EngineSpec, load_engine_spec
from tide_pipeline.models.draft_files import tensor_shapes

ENGINE: dict[str, Any] = {
    "name": "small", "backend": "trtllm", "model": "target", "revision": "0123456789abcdef" * 2 + "01234567", "repo": "owner/small",
    "capture_layers": [1, 5, 8], "soft_targets": False, "champion": "draft", "max_context": 4096, "max_draft_length": 3,
    "architecture": {"hidden_size": 64, "num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
                     "intermediate_size": 96, "vocab_size": 300, "max_position_embeddings": 8192, "rope_theta": 1e4, "rms_norm_eps": 1e-5},
    "draft": {"repo": "owner/small-eagle3", "revision": "f" * 40, "vocab_size": 100}}
BASE: dict[str, Any] = {
    "stack": {"start_timeout_s": 900.0}, "rollout": {"serve_timeout_s": 1.2e3, "bake_s": 1.2e3, "max_bake_s": 3.6e3}}
RECIPES: dict[str, Any] = {
    "base": BASE,
    "serve": {"h100": {"serve": {"gpu": "h100", "max_batch": 8, "prefill_chunk": 1024}}},
    "train": {"a10": {"training": {"gpu": "a10", "window_rows": 256}}, "v100": {"training": {"gpu": "v100", "autocast": False}}}}


def write_gpu_engine(engines: Path, changes: Mapping[str, Any] | None = None, recipes: Mapping[str, Any] | None = None) -> Path:
    """engines/small; `changes` to engine.toml (None takes a key out), `recipes` instead of the usual ones. Returns the folder."""
    values = {**ENGINE, **(changes or {})}
    folder = engines / "small"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "engine.toml").write_text(_toml({key: value for key, value in values.items() if value is not None}))
    (folder / "recipes.toml").write_text(_toml(RECIPES if recipes is None else recipes))
    return folder


def small_config(engine_dir: Path, state: Path, **serve: Any) -> TideConfig:
    return override(TideConfig(engine="small", engines_dir=str(engine_dir.parent), state_dir=str(state)),
                    {"serve": {"gpu": "h100", "max_batch": 8, "prefill_chunk": 1024, **serve}})


def write_gpu_draft(folder: Path, spec: EngineSpec, changes: Mapping[str, Any] | None = None, rename: Mapping[str, str] | None = None,
                    leave_out: tuple[str, ...] = (), tensors_of: Mapping[str, Any] | None = None) -> Path:
    """A draft of zeros; `changes` to its config.json; tensors renamed, left out, or shaped after another config."""
    a = spec.architecture
    config = {"architectures": ["LlamaForCausalLMEagle3"], "hidden_size": a.hidden_size, "vocab_size": a.vocab_size,
              "draft_vocab_size": 100, "num_hidden_layers": 1, "intermediate_size": a.intermediate_size,
              "max_position_embeddings": a.max_position_embeddings,
              "num_attention_heads": a.num_attention_heads, "num_key_value_heads": a.num_key_value_heads, "head_dim": a.head_dim,
              "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(spec.capture_layers)}, **(changes or {})}
    shapes, _ = tensor_shapes({**config, **(tensors_of or {})}, spec)
    tensors = {(rename or {}).get(name, name): torch.zeros(shape, dtype=torch.int64 if name == "d2t" else torch.bfloat16)
               for name, shape in shapes.items() if name not in leave_out}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def small_spec(engines: Path) -> EngineSpec:
    return load_engine_spec(write_gpu_engine(engines))


def _toml(tree: Mapping[str, Any], prefix: str = "") -> str:
    plain = [f"{key} = {json.dumps(value)}" for key, value in tree.items() if not isinstance(value, Mapping)]
    tables = [f"\n[{prefix}{key}]\n" + _toml(value, f"{prefix}{key}.") for key, value in tree.items() if isinstance(value, Mapping)]
    return "\n".join(plain) + "\n" + "".join(tables)
