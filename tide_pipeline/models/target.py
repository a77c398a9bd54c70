"""A Hugging Face Llama checkpoint as an inference network with a KV cache and layer taps. Knows no draft.

Computes in fp32 on a CPU. `taps` are the outputs of the captured layers, `final` the state after the last norm:
logits = lm_head · final.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
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
    tied: bool                     # the embeddings serve as lm_head too


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
    rope = raw.get("rope_parameters") or {}                       # transformers 5; rope_scaling before
    scaling = raw.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or rope.get("rope_type") or "default"
    for name, found, wanted in (("rope type", kind, "default"), ("hidden_act", raw.get("hidden_act", "silu"), "silu")):
        if found != wanted:
            raise CheckpointError(f"{folder}: {name} {found!r} is not supported by the embedded engine; it serves {wanted!r}")
    eos = raw.get("eos_token_id")
    try:
        heads = raw["num_attention_heads"]
        return TargetShape(
            hidden_size=raw["hidden_size"], layers=raw["num_hidden_layers"],
            heads=Heads(heads, raw.get("num_key_value_heads") or heads, raw.get("head_dim") or raw["hidden_size"] // heads),
            intermediate_size=raw["intermediate_size"], vocab_size=raw["vocab_size"], max_positions=raw["max_position_embeddings"],
            rope_theta=raw.get("rope_theta") or rope.get("rope_theta") or 10000.0, eps=raw["rms_norm_eps"],
            eos_ids=tuple(eos) if isinstance(eos, list) else (eos,) if eos is not None else (),
            tied=bool(raw.get("tie_word_embeddings", False)))
    except KeyError as error:
        raise CheckpointError(f"{folder / 'config.json'} lacks {error.args[0]}: fetch the target again") from error


def weight_shapes(shape: TargetShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a checkpoint of this shape holds; a tied one may leave out lm_head."""
    D, I, E = shape.hidden_size, shape.intermediate_size, shape.heads.size  # noqa: E741
    q, kv = shape.heads.query * E, shape.heads.kv * E
    layer = {"self_attn.q_proj": (q, D), "self_attn.k_proj": (kv, D), "self_attn.v_proj": (kv, D), "self_attn.o_proj": (D, q),
             "mlp.gate_proj": (I, D), "mlp.up_proj": (I, D), "mlp.down_proj": (D, I),
             "input_layernorm": (D,), "post_attention_layernorm": (D,)}
    return {"model.embed_tokens.weight": (shape.vocab_size, D), "model.norm.weight": (D,), "lm_head.weight": (shape.vocab_size, D),
            **{f"model.layers.{i}.{name}.weight": size for i in range(shape.layers) for name, size in layer.items()}}


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
    names = ("config.json", "model.safetensors", "tokenizer.json")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"target {folder} is incomplete: {', '.join(missing)} missing; fetch it again")
    files = digest_files({name: folder / name for name in names})
    text = f"{files} layers={spec.capture_layers} final={spec.soft_targets}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Target:
    """The network. Not thread-safe: one engine thread runs it."""

    def __init__(self, folder: Path, spec: EngineSpec) -> None:
        self.shape = read_shape(folder)
        self.spec = spec
        self.digest = engine_digest(folder, spec)
        layers = spec.capture_layers
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= self.shape.layers:
            raise CheckpointError(f"capture_layers {layers} must be ascending layers of the target's {self.shape.layers} (from 0): "
                                  "fix engine.toml")
        weights = read_weights(folder)
        _check_weights(folder, weights, self.shape)
        self.embedding_VD = weights["model.embed_tokens.weight"]
        self.layers = [DecoderLayer(weights, f"model.layers.{i}.", self.shape.heads, self.shape.eps) for i in range(self.shape.layers)]
        self.input_norms = [weights[f"model.layers.{i}.input_layernorm.weight"] for i in range(self.shape.layers)]
        self.norm = weights["model.norm.weight"]
        self.lm_head_VD = self.embedding_VD if self.shape.tied else weights["lm_head.weight"]
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
        B, W = ids_BW.shape
        taps_NG, final_ND = self.forward_rows(ids_BW.reshape(-1), positions_BW.reshape(-1), [W] * B, cache, first_slot)
        return taps_NG.view(B, W, -1), final_ND.view(B, W, -1)

    @torch.inference_mode()
    def forward_rows(self, ids_N: Tensor, positions_N: Tensor, widths: Sequence[int], cache: KVCache,
                     first_slot: int = 0) -> tuple[Tensor, Tensor]:
        """The same for slots with different numbers of tokens, side by side: widths[b] of them belong to slot first_slot + b."""
        at = StepGeometry.build(positions_N, widths, first_slot, cache, self.cos, self.sin)
        x = self.embedding_VD[ids_N]
        taps = []
        for i, layer in enumerate(self.layers):
            x = x + layer.attend(F.rms_norm(x, x.shape[-1:], self.input_norms[i], layer.eps), cache, i, at)
            x += layer.feed_forward(x)
            if i in self.spec.capture_layers:
                taps.append(x)
        return torch.cat(taps, dim=-1), F.rms_norm(x, x.shape[-1:], self.norm, self.shape.eps)

    @torch.inference_mode()
    def logits(self, final_ND: Tensor) -> Tensor:
        """[N, D] -> [N, V]."""
        return self.head(final_ND)


def _check_weights(folder: Path, weights: dict[str, Tensor], shape: TargetShape) -> None:
    """A missing, misshapen or unknown tensor (a bias, a scale) would give other logits than the checkpoint's."""
    wanted = weight_shapes(shape)
    if shape.tied:
        del wanted["lm_head.weight"]
    for name, size in wanted.items():
        if name not in weights:
            raise CheckpointError(f"{folder}/model.safetensors lacks {name}: it does not fit its config.json")
        if tuple(weights[name].shape) != size:
            raise CheckpointError(f"{folder}: {name} is {tuple(weights[name].shape)}, config.json says {size}")
    unknown = sorted(name for name in weights.keys() - wanted.keys()
                     if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq"))
    if unknown:
        raise CheckpointError(f"{folder}/model.safetensors holds {unknown[0]}, which the embedded engine does not know")
