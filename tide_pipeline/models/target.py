"""A Hugging Face checkpoint as an inference network with a KV cache and layer taps. Knows no draft.

Computes in fp32 on a CPU, in bf16 on a GPU. `taps` are the outputs of the captured layers, `final` the state after the last norm:
logits = lm_head · final. families.py says which networks, weights.py in which files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tide_pipeline.engine_spec import EngineSpec
from tide_pipeline.errors import CheckpointError
from tide_pipeline.models.device import dtype_on, to_device
from tide_pipeline.models.families import TargetShape, read_shape
from tide_pipeline.models.geometry import StepGeometry, StepRows
from tide_pipeline.models.layers import DecoderLayer, KVCache
from tide_pipeline.models.linear import Linear
from tide_pipeline.models.rope import rotary_tables
from tide_pipeline.models.static import new_cache
from tide_pipeline.models.weights import INDEX, WHOLE, read_weights, shard_names
from tide_pipeline.provenance import digest_files

__all__ = ["Target", "TargetShape", "engine_digest", "read_embeddings", "read_shape", "read_weights", "weight_shapes"]

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


def weight_shapes(shape: TargetShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a checkpoint of this shape holds; a tied one may leave out lm_head."""
    D, I, E = shape.hidden_size, shape.intermediate_size, shape.heads.size  # noqa: E741
    q, kv = shape.heads.query * E, shape.heads.kv * E
    attention = {"q_proj": (q, D), "k_proj": (kv, D), "v_proj": (kv, D), "o_proj": (D, q)}
    layer: dict[str, tuple[int, ...]] = {
        **{f"self_attn.{name}.weight": size for name, size in attention.items()},
        **{f"self_attn.{name}.bias": attention[name][:1] for name in shape.biased},
        **{f"self_attn.{name}.weight": (E,) for name in ("q_norm", "k_norm") if shape.qk_norm},
        "mlp.gate_proj.weight": (I, D), "mlp.up_proj.weight": (I, D), "mlp.down_proj.weight": (D, I),
        "input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
    return {EMBEDDING: (shape.vocab_size, D), "model.norm.weight": (D,), LM_HEAD: (shape.vocab_size, D),
            **{f"model.layers.{i}.{name}": size for i in range(shape.layers) for name, size in layer.items()}}


def engine_digest(folder: Path, spec: EngineSpec) -> str:
    """What captured states depend on: the target's weights and shape, and which layers are tapped. 16 hex digits.

    Of a target that is named by its revision on the hub, no byte has to be here.
    """
    if spec.repo:
        return spec.reference_digest
    shards = shard_names(folder)
    names = ("config.json", "tokenizer.json", *shards, *(() if shards == (WHOLE,) else (INDEX,)))
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise CheckpointError(f"target {folder} is incomplete: {', '.join(missing)} missing; fetch it again")
    files = digest_files({name: folder / name for name in names})
    text = f"{files} layers={spec.capture_layers} final={spec.soft_targets}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_embeddings(folder: Path, shape: TargetShape) -> tuple[Tensor, Tensor]:
    """Embeddings on the way in and lm_head on the way out, [V, D] each, without the layers between them."""
    weights = _checked_weights(folder, shape, only=(EMBEDDING, LM_HEAD))
    return weights[EMBEDDING], weights[LM_HEAD]


class Target:
    """The network. Not thread-safe: one engine thread runs it."""

    def __init__(self, folder: Path, spec: EngineSpec, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        shape, digest, device = read_shape(folder), engine_digest(folder, spec), device or torch.device("cpu")
        _check_layers(shape, spec)
        _check_window(folder, shape, spec)
        weights = _checked_weights(folder, shape, device=device, dtype=dtype or dtype_on(device))
        self._take(shape, spec, digest, weights)

    @classmethod
    def of(cls, shape: TargetShape, spec: EngineSpec, digest: str, weights: dict[str, Tensor]) -> Target:
        """From tensors in memory, named and shaped as `weight_shapes` says; `weights` is emptied."""
        _check_layers(shape, spec)
        made = cls.__new__(cls)
        made._take(shape, spec, digest, weights)
        return made

    def _take(self, shape: TargetShape, spec: EngineSpec, digest: str, weights: dict[str, Tensor]) -> None:
        """Layer by layer, so that no more than one of them is held twice while its products are fused."""
        self.shape, self.spec, self.digest = shape, spec, digest
        self.embedding_VD, self.lm_head_VD = weights.pop(EMBEDDING), weights.pop(LM_HEAD)
        self.device, self.dtype = self.embedding_VD.device, self.embedding_VD.dtype
        self.norm = weights.pop("model.norm.weight")
        self.layers, self.input_norms = [], []
        for prefix in (f"model.layers.{i}." for i in range(shape.layers)):
            own = {name: weights.pop(name) for name in [name for name in weights if name.startswith(prefix)]}
            self.layers.append(DecoderLayer(own, prefix, shape.heads, shape.eps))
            self.input_norms.append(own[f"{prefix}input_layernorm.weight"])
        self.head = Linear(self.lm_head_VD)
        cos, sin = rotary_tables(shape.rope, shape.heads.size, shape.max_positions + 16)
        self.cos, self.sin = cos.to(self.device, self.dtype), sin.to(self.device, self.dtype)

    def new_cache(self, slots: int, positions: int) -> KVCache:
        """Room for `positions` tokens in each slot."""
        widest = 1 + self.spec.max_draft_length
        return new_cache(self._pass, self.shape.layers, slots, positions, self.shape.heads, self.embedding_VD, widest)

    @torch.inference_mode()
    def forward(self, ids_BW: Tensor, positions_BW: Tensor, cache: KVCache, first_slot: int = 0) -> tuple[Tensor, Tensor]:
        """Consume W tokens in each of B slots: ids and positions from the host; returns taps [B, W, G * D] and final states [B, W, D].

        Rows past a request's real tokens may be fed as padding: later steps overwrite what they leave in the cache.
        """
        B, W = ids_BW.shape
        taps_NG, final_ND = self.forward_rows(ids_BW.reshape(-1), positions_BW.reshape(-1), [W] * B, cache, first_slot)
        return taps_NG.view(B, W, -1), final_ND.view(B, W, -1)

    @torch.inference_mode()
    def forward_rows(self, ids_N: Tensor, positions_N: Tensor, widths: Sequence[int], cache: KVCache,
                     first_slot: int = 0) -> tuple[Tensor, Tensor]:
        """The same for slots with different numbers of tokens, side by side: widths[b] of them belong to slot first_slot + b."""
        if cache.static is not None and cache.static.takes(widths, first_slot):
            taps_NG, final_ND = cache.static.run(cache, ids_N, positions_N, widths)
            return taps_NG, final_ND
        rows = StepRows.build(positions_N, widths, first_slot, cache.positions)
        return self._pass(cache, rows.to(self.device), to_device(ids_N, self.device))

    @torch.inference_mode()
    def logits(self, final_ND: Tensor) -> Tensor:
        """[N, D] -> [N, V]."""
        return self.head(final_ND)

    def _pass(self, cache: KVCache, rows: StepRows, ids_N: Tensor) -> tuple[Tensor, Tensor]:
        """All on the device; reads no value back."""
        at = StepGeometry.of(rows, self.shape.heads.groups, self.cos, self.sin)
        x = self.embedding_VD[ids_N]
        taps = []
        for i, layer in enumerate(self.layers):
            x = x + layer.attend(F.rms_norm(x, x.shape[-1:], self.input_norms[i], layer.eps), cache, i, at)
            x += layer.feed_forward(x)
            if i in self.spec.capture_layers:
                taps.append(x)
        return torch.cat(taps, dim=-1), F.rms_norm(x, x.shape[-1:], self.norm, self.shape.eps)

def _check_layers(shape: TargetShape, spec: EngineSpec) -> None:
    layers = spec.capture_layers
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= shape.layers:
        raise CheckpointError(f"capture_layers {layers} must be ascending layers of the target's {shape.layers} (from 0): fix engine.toml")


def _check_window(folder: Path, shape: TargetShape, spec: EngineSpec) -> None:
    """Up to the window's length a sliding layer sees what a full one sees."""
    if shape.window is not None and shape.window < min(spec.max_context, shape.max_positions):
        raise CheckpointError(f"{folder}: a sliding window of {shape.window} tokens is not supported by the embedded engine beyond its own "
                              f"length: set max_context in engine.toml to {shape.window} or less (it is {spec.max_context})")


def _checked_weights(folder: Path, shape: TargetShape, only: Collection[str] | None = None, device: torch.device | None = None,
                     dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A missing, misshapen or unknown tensor (a bias, a scale) would give other logits than the checkpoint's."""
    weights, wanted = read_weights(folder, only, device, dtype), weight_shapes(shape)
    if shape.tied and EMBEDDING in weights:
        lm_head = weights.setdefault(LM_HEAD, weights[EMBEDDING])
        if not lm_head.equal(weights[EMBEDDING]):
            raise CheckpointError(f"{folder}: config.json ties lm_head to the embeddings, but the files hold two different ones: "
                                  "set tie_word_embeddings to what the target was trained with")
    for name in wanted if only is None else only:
        if name not in weights:
            raise CheckpointError(f"{folder} lacks {name}: its safetensors do not fit its config.json")
        if tuple(weights[name].shape) != wanted[name]:
            raise CheckpointError(f"{folder}: {name} is {tuple(weights[name].shape)}, config.json says {wanted[name]}")
    unknown = sorted(name for name in weights.keys() - wanted.keys() if not name.endswith("rotary_emb.inv_freq"))
    if unknown:
        raise CheckpointError(f"{folder} holds {unknown[0]}, which the embedded engine does not know in this family")
    return weights
