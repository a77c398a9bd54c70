"""Does a draft's folder fit a target? Asked of config.json and of the header of model.safetensors. Knows no weights and no torch.

What is wrong here loads without a word on a serving engine and shows as low acceptance, or as an error on the GPU an hour later.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tide_pipeline.engine_spec import Architecture, EngineSpec, StartingDraft
from tide_pipeline.errors import CheckpointError, EngineMismatch

ARCHITECTURE = "LlamaForCausalLMEagle3"
MAX_HEADER = 100 << 20             # bytes: what the format itself allows


def check_draft(folder: Path, spec: EngineSpec) -> dict[str, Any]:
    """Its config.json, once all of it fits `spec`.

    Raises:
        CheckpointError: files missing, pickled instead of safetensors, or not an EAGLE-3 draft.
        EngineMismatch: made for another target, other layers or shorter positions; the message names the fix.
    """
    config = read_config(folder)
    for wrong in _mismatches(config, spec):
        raise EngineMismatch(f"draft {folder} does not fit {spec.name}: {wrong}")
    _check_tensors(folder, read_header(folder), config, spec)
    return config


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of an EAGLE-3 draft. Raises CheckpointError."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is no draft checkpoint: config.json missing")
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise CheckpointError(f"{folder}/config.json is not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("draft_vocab_size"), int):
        raise CheckpointError(f"{folder}/config.json has no draft_vocab_size: engines would not take it for an EAGLE-3 draft. "
                              "Set it to the rows of lm_head.weight")
    if config.get("architectures") != [ARCHITECTURE]:
        raise CheckpointError(f"{folder}/config.json: architectures is {config.get('architectures')}, must be [{ARCHITECTURE!r}]: set it")
    return config


def read_header(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor in model.safetensors, by name. Raises CheckpointError."""
    file = folder / "model.safetensors"
    if not file.is_file():
        pickled = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt")))
        raise CheckpointError(f"{folder} has no model.safetensors" + (f" but {pickled[0]}: a pickle runs code when it is read, so it is "
                              "never read here; take a revision with safetensors, or convert it in a sandbox" if pickled else ""))
    try:
        with file.open("rb") as handle:
            size = struct.unpack("<Q", handle.read(8))[0]
            if size > MAX_HEADER:
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(handle.read(size))
            tensors = {name: (str(t["dtype"]), tuple(t["shape"]), t["data_offsets"][1]) for name, t in header.items()
                       if name != "__metadata__"}
        end = 8 + size + max((last for *_, last in tensors.values()), default=0)
        if file.stat().st_size != end:
            raise ValueError(f"{file.stat().st_size} bytes, its header says {end}")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{file} can't be read ({error}): fetch the draft again") from error
    return {name: (kind, shape) for name, (kind, shape, _) in tensors.items()}


def _mismatches(config: Mapping[str, Any], spec: EngineSpec) -> Iterator[str]:
    a = spec.architecture
    for name, wanted in (("hidden_size", a.hidden_size), ("vocab_size", a.vocab_size)):
        if config.get(name) != wanted:
            yield f"{name} is {config.get(name)}, the target's is {wanted}: it was made for another target, train one with `tide train`"
    if config.get("num_hidden_layers", 1) != 1:
        yield f"num_hidden_layers is {config['num_hidden_layers']}, an EAGLE-3 draft has 1 decoder layer: this is another kind of draft"
    if not 0 < config["draft_vocab_size"] <= a.vocab_size:
        yield f"draft_vocab_size is {config['draft_vocab_size']}, the target's vocabulary has {a.vocab_size}: set it to the rows of lm_head"
    positions = config.get("max_position_embeddings", 0)
    if positions < spec.max_context:
        yield (f"max_position_embeddings is {positions}" + (", a default left in by mistake" if positions == 2_048 else "")
               + f", requests reach {spec.max_context}: set it to the target's {a.max_position_embeddings} in its config.json "
               "(with less, acceptance falls without an error)")
    layers = tuple(config.get("eagle_config", {}).get("eagle_aux_hidden_state_layer_ids") or spec.capture_layers)
    if layers != spec.capture_layers:
        yield (f"it reads layers {list(layers)}, the engine captures {list(spec.capture_layers)}: set capture_layers = {list(layers)} in "
               "engine.toml (signals captured before are then of no use to it), or take another draft")
    target = config.get("tide", {})
    if target.get("engine_digest") not in (None, "", spec.reference_digest) and spec.repo:
        yield (f"it was trained on signals of engine {target['engine_digest']}, this one is {spec.reference_digest}: recapture and train, "
               "or go back to the revision and layers it was trained with")


def _check_tensors(folder: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], config: Mapping[str, Any], spec: EngineSpec) -> None:
    wanted, optional = tensor_shapes(config, spec)
    if old := sorted(name for name in tensors if name.startswith("layers.0.")):
        raise CheckpointError(f"{folder}: {old[0]} must be called {old[0].replace('layers.0.', 'midlayer.')}: TensorRT-LLM 1.2 does not "
                              "rename it")
    for name, shape in wanted.items():
        if name not in tensors and name not in optional:
            raise CheckpointError(f"{folder}/model.safetensors lacks {name}: it is not the EAGLE-3 format that TensorRT-LLM loads")
        if name in tensors and tensors[name][1] != shape:
            raise EngineMismatch(f"draft {folder}: {name} is {tensors[name][1]}, its config.json and {spec.name} say {shape}: "
                                 "correct config.json, or take the draft of this target")
    reduced = config["draft_vocab_size"] < config["vocab_size"]
    if reduced and not {"lm_head.weight", "d2t"} <= tensors.keys():
        raise CheckpointError(f"{folder}: a draft vocabulary of {config['draft_vocab_size']} needs lm_head.weight and d2t in the file")


def tensor_shapes(config: Mapping[str, Any], spec: EngineSpec) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
    """Every tensor of the format, and those that a draft may leave to the target."""
    a, U = spec.architecture, config["draft_vocab_size"]
    D, I = a.hidden_size, config.get("intermediate_size", a.intermediate_size)  # noqa: E741
    heads, kv = config.get("num_attention_heads", a.num_attention_heads), config.get("num_key_value_heads", a.num_key_value_heads)
    size = config.get("head_dim") or a.head_dim
    attention = {"q_proj": (heads * size, 2 * D), "k_proj": (kv * size, 2 * D), "v_proj": (kv * size, 2 * D), "o_proj": (D, heads * size)}
    mlp = {"gate_proj": (I, D), "up_proj": (I, D), "down_proj": (D, I)}
    norms = {f"midlayer.{name}.weight": (D,) for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")}
    layer: dict[str, tuple[int, ...]] = {**{f"midlayer.self_attn.{name}.weight": shape for name, shape in attention.items()},
                                         **{f"midlayer.mlp.{name}.weight": shape for name, shape in mlp.items()}, **norms}
    shapes = {"fc.weight": (D, len(spec.capture_layers) * D), "norm.weight": (D,), "lm_head.weight": (U, D), "d2t": (U,), **layer}
    return shapes, frozenset({"lm_head.weight", "d2t"})


def draft_of(config: Mapping[str, Any], tensors: Mapping[str, Any], a: Architecture) -> StartingDraft:
    """What a checked folder weighs, in the terms of engine.toml."""
    return StartingDraft(intermediate_size=config.get("intermediate_size", a.intermediate_size), vocab_size=config["draft_vocab_size"],
                         has_lm_head="lm_head.weight" in tensors)
