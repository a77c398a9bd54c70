"""Draft checkpoint folders in the EAGLE-3 Hugging Face format. Knows no engine and no registry.

    config.json          architectures ["LlamaForCausalLMEagle3"], draft_vocab_size, eagle_config; our `tide` section
    model.safetensors    fc, norm, lm_head, d2t, t2d, midlayer.*; bf16
    provenance.json      birth certificate
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from tide_pipeline.contracts import EngineBuild
from tide_pipeline.errors import BuildError, CheckpointError, EngineMismatch
from tide_pipeline.models.draft_files import ARCHITECTURE
from tide_pipeline.models.eagle3 import DraftShape, Eagle3Draft
from tide_pipeline.models.families import TargetShape
from tide_pipeline.models.layers import Heads
from tide_pipeline.models.speculators import as_eagle3, is_speculators, renamed
from tide_pipeline.provenance import birth_certificate, digest_files, write_atomic, write_json

FILES = ("config.json", "model.safetensors")
SIZES = ("hidden_size", "vocab_size", "draft_vocab_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
         "max_position_embeddings", "rope_theta", "rms_norm_eps")


@dataclass(frozen=True)
class DraftIdentity:
    """What a draft was made for."""

    target: str
    engine_digest: str
    capture_layers: tuple[int, ...]


def shape_for(target: TargetShape, num_taps: int, draft_vocab_size: int | None = None) -> DraftShape:
    """A draft of one layer with the target's own sizes and plain rotary positions, whatever the target's are."""
    return DraftShape(target.hidden_size, num_taps, target.heads, target.intermediate_size, target.vocab_size,
                      draft_vocab_size or target.vocab_size, target.max_positions, target.rope.theta, target.eps)


def digest_draft(folder: Path) -> str:
    """SHA-256 over config.json and model.safetensors. Raises CheckpointError when one is missing."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} is no draft checkpoint: {', '.join(missing)} missing")
    return digest_files({name: folder / name for name in FILES})


def checked_digest(folder: Path, build: EngineBuild) -> str:
    """The digest of a build's draft. Raises CheckpointError, and BuildError when it is not the one that was built."""
    found = digest_draft(folder)
    if build.draft_digest and found != build.draft_digest:
        raise BuildError(f"draft {folder} has digest {found[:16]}, build {build.build_id} names {build.draft_digest[:16]}: "
                         "it was altered, build it again with `tide build`")
    return found


def save_draft(draft: Eagle3Draft, folder: Path, identity: DraftIdentity, provenance: dict[str, Any]) -> str:
    """Write the folder, each file whole or absent, weights in bf16; returns its digest."""
    s = draft.shape
    config = {
        "architectures": [ARCHITECTURE], "model_type": "llama", "hidden_size": s.hidden_size, "intermediate_size": s.intermediate_size,
        "num_hidden_layers": 1, "num_attention_heads": s.heads.query, "num_key_value_heads": s.heads.kv, "head_dim": s.heads.size,
        "hidden_act": "silu", "rms_norm_eps": s.eps, "rope_theta": s.rope_theta, "max_position_embeddings": s.max_positions,
        "vocab_size": s.vocab_size, "draft_vocab_size": s.draft_vocab_size, "tie_word_embeddings": False, "attention_bias": False,
        "torch_dtype": "bfloat16",
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(identity.capture_layers), "use_aux_hidden_state": True},
        "tide": {"target": identity.target, "engine_digest": identity.engine_digest},
    }
    weights = {name: (tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor).contiguous().cpu()
               for name, tensor in draft.state_dict().items()}
    write_atomic(folder / "model.safetensors", save(weights, metadata={"format": "pt"}))
    write_json(folder / "config.json", config)
    digest = digest_draft(folder)
    write_json(folder / "provenance.json", birth_certificate(**provenance, digest=digest))
    return digest


def read_identity(folder: Path) -> DraftIdentity:
    """Raises CheckpointError when config.json is missing or is not an EAGLE-3 draft's."""
    config = _config(folder)
    ours = config.get("tide", {})
    return DraftIdentity(ours.get("target", ""), ours.get("engine_digest", ""),
                         tuple(config.get("eagle_config", {}).get("eagle_aux_hidden_state_layer_ids", ())))


def load_draft(folder: Path, target: TargetShape, expect: DraftIdentity | None = None) -> Eagle3Draft:
    """Load and check a draft before anything depends on it; weights in fp32.

    Raises:
        CheckpointError: files missing, malformed, wrong shapes, d2t out of range, NaN or infinite weights.
        EngineMismatch: trained for another target or other captured layers than `expect`.
    """
    config, found = _config(folder), read_identity(folder)
    missing = [name for name in SIZES if name not in config]
    if missing:
        raise CheckpointError(f"{folder}/config.json lacks {', '.join(missing)}")
    if expect is not None and found.engine_digest and found.engine_digest != expect.engine_digest:
        raise EngineMismatch(f"draft {folder} was trained on engine {found.engine_digest} ({found.target}), this is {expect.engine_digest} "
                             f"({expect.target}): train one for this target with `tide train`")
    if expect is not None and found.capture_layers and found.capture_layers != expect.capture_layers:
        raise EngineMismatch(f"draft {folder} reads layers {found.capture_layers}, this engine captures {expect.capture_layers}")
    if (config["hidden_size"], config["vocab_size"]) != (target.hidden_size, target.vocab_size):
        raise EngineMismatch(f"draft {folder} is for hidden size {config['hidden_size']} and vocabulary {config['vocab_size']}; "
                             f"the target has {target.hidden_size} and {target.vocab_size}")
    if config["max_position_embeddings"] < target.max_positions:
        raise EngineMismatch(f"draft {folder} ends at position {config['max_position_embeddings']}, the target at {target.max_positions}: "
                             "set max_position_embeddings to the target's")
    weights = _weights(folder)
    if "fc.weight" not in weights:
        raise CheckpointError(f"{folder}/model.safetensors: fc.weight is missing")
    num_taps = weights["fc.weight"].shape[-1] // config["hidden_size"]
    if num_taps < 1 or (expect is not None and num_taps != len(expect.capture_layers)):
        raise EngineMismatch(f"draft {folder} reads {num_taps} layers, this engine captures "
                             f"{len(expect.capture_layers) if expect else 'at least 1'}")
    draft = Eagle3Draft(DraftShape(
        config["hidden_size"], num_taps, Heads(config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]),
        config["intermediate_size"], config["vocab_size"], config["draft_vocab_size"], config["max_position_embeddings"],
        config["rope_theta"], config["rms_norm_eps"]))
    wanted = draft.state_dict()
    for name in sorted(wanted.keys() | weights.keys()):
        if name not in weights or name not in wanted:
            raise CheckpointError(f"{folder}/model.safetensors: {name} is {'missing' if name in wanted else 'unknown'}")
        if weights[name].shape != wanted[name].shape:
            raise CheckpointError(f"{folder}: {name} is {tuple(weights[name].shape)}, expected {tuple(wanted[name].shape)}")
        if not torch.isfinite(weights[name]).all():
            raise CheckpointError(f"{folder}: {name} holds NaN or infinite values; this draft must not be served")
    ids = weights["d2t"] + torch.arange(len(weights["d2t"]))
    if int(ids.min()) < 0 or int(ids.max()) >= config["vocab_size"]:
        raise CheckpointError(f"{folder}: d2t points outside the target's vocabulary of {config['vocab_size']}")
    draft.load_state_dict(weights)
    return draft


def _config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is no draft checkpoint: config.json missing") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{folder}/config.json is not JSON: {error}") from error
    if is_speculators(config):
        return as_eagle3(config, ARCHITECTURE)
    if config.get("architectures") != [ARCHITECTURE] or "draft_vocab_size" not in config:
        raise CheckpointError(f"{folder} is not an EAGLE-3 draft: architectures must be [{ARCHITECTURE!r}] and draft_vocab_size set")
    return config


def _weights(folder: Path) -> dict[str, Tensor]:
    try:
        return {name: tensor.float() if tensor.is_floating_point() else tensor
                for name, tensor in renamed(load_file(folder / "model.safetensors")).items()}
    except (FileNotFoundError, OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}/model.safetensors can't be read ({error}): fetch the draft again from the registry") from error
