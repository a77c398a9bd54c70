"""What the config.json of a Hugging Face decoder says, for the families the embedded engine serves. Knows no tensors.

Llama, Mistral, Qwen2 and Qwen3 are one network with few switches: biases on the attention's products, a norm on every query and key
head, stretched rotary positions, a sliding window. Whatever else would change the logits is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tide_pipeline.errors import CheckpointError
from tide_pipeline.models.layers import Heads
from tide_pipeline.models.rope import Rope, read_rope

QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Family:
    """How the networks of one `model_type` differ from a plain Llama."""

    model_type: str
    biased: tuple[str, ...] = ()                   # products of the attention that always have a bias,
    biased_if_asked: tuple[str, ...] = ()          # and those that have one with `attention_bias`
    qk_norm: bool = False
    slides: bool = False                           # heeds `sliding_window` on every layer;
    slides_if_asked: bool = False                  # with `use_sliding_window`, on some


FAMILIES = {
    "LlamaForCausalLM": Family("llama", biased_if_asked=(*QKV, "o_proj")),
    "MistralForCausalLM": Family("mistral", slides=True),
    "Qwen2ForCausalLM": Family("qwen2", biased=QKV, slides_if_asked=True),
    "Qwen3ForCausalLM": Family("qwen3", biased_if_asked=(*QKV, "o_proj"), qk_norm=True, slides_if_asked=True),
}


@dataclass(frozen=True)
class TargetShape:
    """The facts of a target that its network, its draft and its signals follow from."""

    hidden_size: int
    layers: int
    heads: Heads
    intermediate_size: int
    vocab_size: int
    max_positions: int
    rope: Rope
    eps: float
    eos_ids: tuple[int, ...]
    tied: bool                     # the embeddings serve as lm_head too
    biased: tuple[str, ...]        # products of the attention that have a bias
    qk_norm: bool                  # queries and keys are normed head by head before they are turned
    window: int | None             # tokens that some layer looks back on, itself included; None: all of them


def read_shape(folder: Path) -> TargetShape:
    """Read `config.json`. Raises CheckpointError for a missing folder, or a network we do not serve."""
    raw, where = _read(folder / "config.json"), str(folder)
    if raw is None:
        raise CheckpointError(f"no target at {folder}: config.json is missing (see `model` in engine.toml)")
    family = _family(raw, where)
    positions, layers = _whole(raw, "max_position_embeddings", where), _whole(raw, "num_hidden_layers", where)
    return TargetShape(
        hidden_size=_whole(raw, "hidden_size", where), layers=layers, heads=_heads(raw, where),
        intermediate_size=_whole(raw, "intermediate_size", where), vocab_size=_whole(raw, "vocab_size", where), max_positions=positions,
        rope=read_rope(raw, where), eps=float(_given(raw, "rms_norm_eps", where)), eos_ids=_eos_ids(folder, raw),
        tied=bool(raw.get("tie_word_embeddings", False)),
        biased=family.biased + (family.biased_if_asked if raw.get("attention_bias") else ()),
        qk_norm=family.qk_norm, window=_window(raw, family, layers, where))


def _family(raw: Mapping[str, Any], where: str) -> Family:
    architecture = (raw.get("architectures") or ["none"])[0]
    family = FAMILIES.get(architecture)
    if family is None or raw.get("model_type", family.model_type) != family.model_type:
        raise CheckpointError(f"{where}: architecture {architecture} is not supported by the embedded engine "
                              f"(model_type {raw.get('model_type')}); it serves {', '.join(FAMILIES)}")
    quantised = raw.get("quantization_config")
    if quantised:
        raise CheckpointError(f"{where}: quantisation {quantised.get('quant_method')!r} is not supported by the embedded engine; "
                              "it serves weights in fp32, bf16 and fp16: fetch the unquantised checkpoint")
    for name, found, wanted in (("hidden_act", raw.get("hidden_act", "silu"), "silu"), ("mlp_bias", raw.get("mlp_bias", False), False)):
        if found != wanted:
            raise CheckpointError(f"{where}: {name} {found!r} is not supported by the embedded engine; it serves {wanted!r}")
    return family


def _heads(raw: Mapping[str, Any], where: str) -> Heads:
    query = _whole(raw, "num_attention_heads", where)
    kv = _whole(raw, "num_key_value_heads", where) if raw.get("num_key_value_heads") is not None else query
    size = _whole(raw, "head_dim", where) if raw.get("head_dim") is not None else _whole(raw, "hidden_size", where) // query
    if query % kv or size % 2:
        raise CheckpointError(f"{where}: {query} query heads over {kv} key/value heads of size {size} are not supported by the embedded "
                              "engine; it serves groups of equal size and even heads")
    return Heads(query, kv, size)


def _window(raw: Mapping[str, Any], family: Family, layers: int, where: str) -> int | None:
    window = _whole(raw, "sliding_window", where) if raw.get("sliding_window") is not None else None
    if family.slides:
        return window
    if not family.slides_if_asked:
        return None
    asked = window is not None and raw.get("use_sliding_window", False)
    sliding = max(0, layers - raw.get("max_window_layers", 28)) if asked else 0
    kinds = set(raw.get("layer_types") or ["full_attention"] * (layers - sliding) + ["sliding_attention"] * sliding)
    if kinds == {"full_attention"}:
        return None
    if not asked or not kinds <= {"full_attention", "sliding_attention"}:
        raise CheckpointError(f"{where}: layer_types {', '.join(sorted(kinds))} are not supported by the embedded engine; it serves "
                              "full_attention, and sliding_attention with use_sliding_window and sliding_window")
    return window


def read_outline(folder: Path) -> tuple[int, tuple[int, ...]]:
    """Hidden size and end-of-text tokens: what follows from a target that another engine computes. Raises CheckpointError."""
    raw = _read(folder / "config.json")
    if raw is None:
        raise CheckpointError(f"no target at {folder}: config.json is missing (put a snapshot there, see `model` in engine.toml)")
    return _whole(raw, "hidden_size", str(folder)), _eos_ids(folder, raw)


def _eos_ids(folder: Path, raw: Mapping[str, Any]) -> tuple[int, ...]:
    """Those of generation_config.json come first, as in `generate`: chat models end a turn with other tokens than a text."""
    generation = _read(folder / "generation_config.json") or {}
    eos = generation.get("eos_token_id")
    eos = raw.get("eos_token_id") if eos is None else eos
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(token, int) for token in ids):
        raise CheckpointError(f"{folder}: eos_token_id must be token ids, got {eos!r}")
    return tuple(ids)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        raw = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} is not a JSON object: fetch the target again")
    return raw


def _given(raw: Mapping[str, Any], name: str, where: str) -> Any:
    if raw.get(name) is None:
        raise CheckpointError(f"{where}/config.json lacks {name}: fetch the target again")
    return raw[name]


def _whole(raw: Mapping[str, Any], name: str, where: str) -> int:
    value = _given(raw, name, where)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{where}/config.json: {name} must be a whole number above 0, got {value!r}")
    return value
