"""A Hugging Face Llama checkpoint as an inference network with a KV cache and layer taps. Knows no draft.

Computes in fp32 on a CPU. `taps` are the outputs of the captured layers, `final` the state after the last norm:
logits = lm_head · final.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tide_pipeline.config import EngineSpec
from tide_pipeline.errors import CheckpointError
from tide_pipeline.models.layers import DecoderLayer, Heads, KVCache, StepGeometry, rotary_tables
from tide_pipeline.models.linear import Linear
from tide_pipeline.provenance import digest_files

SUPPORTED = ("LlamaForCausalLM",)


@dataclass(frozen=True)
class TargetShape:
    """The facts of a target that its draft and its signals must agree with."""

    hidden_size: int
    layers: int
    heads: Heads
    intermediate_size: int
    vocab_size: int
    max_positions: int
    rope_theta: float
    eps: float
    eos_ids: tuple[int, ...]


def read_shape(folder: Path) -> TargetShape:
    """Read `config.json`. Raises CheckpointError for a missing folder or an architecture we do not serve."""
    try:
        raw: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"no target at {folder}: config.json is missing (see `model` in engine.toml)") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{folder / 'config.json'} is not JSON: {error}") from error
    architecture = (raw.get("architectures") or ["none"])[0]
    if architecture not in SUPPORTED:
        raise CheckpointError(f"{folder}: architecture {architecture} is not supported by the embedded engine; "
                              f"it serves {', '.join(SUPPORTED)}")
    if raw.get("rope_scaling"):
        raise CheckpointError(f"{folder}: rope_scaling is not supported by the embedded engine")
    rope = raw.get("rope_parameters") or {}
    eos = raw.get("eos_token_id")
    heads = raw["num_attention_heads"]
    return TargetShape(
        hidden_size=raw["hidden_size"], layers=raw["num_hidden_layers"],
        heads=Heads(heads, raw.get("num_key_value_heads", heads), raw.get("head_dim") or raw["hidden_size"] // heads),
        intermediate_size=raw["intermediate_size"], vocab_size=raw["vocab_size"], max_positions=raw["max_position_embeddings"],
        rope_theta=raw.get("rope_theta", rope.get("rope_theta", 10000.0)), eps=raw["rms_norm_eps"],
        eos_ids=tuple(eos) if isinstance(eos, list) else (eos,) if eos is not None else ())


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of `model.safetensors` in fp32. Raises CheckpointError when missing, cut short or not finite."""
    file = folder / "model.safetensors"
    try:
        weights = {name: tensor.float() for name, tensor in load_file(file).items()}
    except (FileNotFoundError, OSError) as error:
        raise CheckpointError(f"{file} can't be read: {error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{file} is not a whole safetensors file ({error}); fetch it again") from error
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{file}: {name} holds NaN or infinite values")
    return weights


def engine_digest(folder: Path, spec: EngineSpec) -> str:
    """What captured states depend on: the target's weights and shape, and which layers are tapped. 16 hex digits."""
    files = digest_files({name: folder / name for name in ("config.json", "model.safetensors", "tokenizer.json")})
    text = f"{files} layers={spec.capture_layers} final={spec.soft_targets}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Target:
    """The network. Not thread-safe: one engine thread runs it."""

    def __init__(self, folder: Path, spec: EngineSpec) -> None:
        self.shape = read_shape(folder)
        self.spec = spec
        self.digest = engine_digest(folder, spec)
        if max(spec.capture_layers) >= self.shape.layers:
            raise CheckpointError(f"capture_layers {spec.capture_layers} reach past the target's {self.shape.layers} layers: "
                                  "fix engine.toml")
        weights = read_weights(folder)
        try:
            self.embedding_VD = weights["model.embed_tokens.weight"]
            self.layers = [DecoderLayer(weights, f"model.layers.{i}.", self.shape.heads, self.shape.eps) for i in range(self.shape.layers)]
            self.input_norms = [weights[f"model.layers.{i}.input_layernorm.weight"] for i in range(self.shape.layers)]
            self.norm = weights["model.norm.weight"]
            self.lm_head_VD = weights.get("lm_head.weight", self.embedding_VD)
        except KeyError as error:
            raise CheckpointError(f"{folder}/model.safetensors lacks {error.args[0]}: it does not fit its config.json") from error
        if self.embedding_VD.shape != (self.shape.vocab_size, self.shape.hidden_size):
            raise CheckpointError(f"{folder}: embeddings are {tuple(self.embedding_VD.shape)}, config.json says "
                                  f"{(self.shape.vocab_size, self.shape.hidden_size)}")
        self.head = Linear(self.lm_head_VD)
        self.cos, self.sin = rotary_tables(self.shape.heads.size, self.shape.max_positions + 16, self.shape.rope_theta)

    def new_cache(self, slots: int, positions: int) -> KVCache:
        """Room for `positions` tokens in each slot."""
        return KVCache(self.shape.layers, slots, positions, self.shape.heads)

    @torch.inference_mode()
    def forward(self, ids_BW: Tensor, positions_BW: Tensor, cache: KVCache, first_slot: int = 0) -> tuple[Tensor, Tensor]:
        """Consume W tokens in each of B slots: returns taps [B, W, G * D] and final states [B, W, D].

        Rows past a request's real tokens may be fed as padding: later steps overwrite what they leave in the cache.
        """
        at = StepGeometry.build(positions_BW, first_slot, cache, self.cos, self.sin)
        x = self.embedding_VD[ids_BW.reshape(-1)]
        taps = []
        for i, layer in enumerate(self.layers):
            x = x + layer.attend(F.rms_norm(x, x.shape[-1:], self.input_norms[i], layer.eps), cache, i, at)
            x += layer.feed_forward(x)
            if i in self.spec.capture_layers:
                taps.append(x)
        final = F.rms_norm(x, x.shape[-1:], self.norm, self.shape.eps)
        return torch.cat(taps, dim=-1).view(at.B, at.W, -1), final.view(at.B, at.W, -1)

    @torch.inference_mode()
    def logits(self, final_ND: Tensor) -> Tensor:
        """[N, D] -> [N, V]."""
        return self.head(final_ND)
