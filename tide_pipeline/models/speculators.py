"""EAGLE-3 drafts as the `speculators` library (vLLM) saves them, read in the names of ours. Knows no network.

    theirs                                         ours
    transformer_layer_config.*                     the sizes in config.json
    eagle_aux_hidden_state_layer_ids               minus 1: theirs count the embeddings as hidden state 0, ours are layer outputs
    layers.0.*                                     midlayer.*
    embed_tokens, verifier_lm_head, verifier_norm  the target's, left out
    no d2t and t2d                                 the whole vocabulary

A draft whose forward pass ours is not (other norms, more layers, trained embeddings) is refused: it would load and draft nonsense.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tide_pipeline.errors import CheckpointError

LAYER = "layers.0."
SIZES = ("hidden_size", "vocab_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
         "max_position_embeddings", "rms_norm_eps")
OTHER_NETWORKS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "embed_requires_grad")


def is_speculators(config: Mapping[str, Any]) -> bool:
    """Whether config.json is one of theirs."""
    return "speculators_model_type" in config


def as_eagle3(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """Their config.json as one of `architecture`. Raises CheckpointError for a network that is not ours."""
    layer = config.get("transformer_layer_config", {})
    if config["speculators_model_type"] != "eagle3" or layer.get("model_type") != "llama" or layer.get("num_hidden_layers", 1) != 1:
        raise CheckpointError(f"a speculators draft of type {config['speculators_model_type']!r} with {layer.get('num_hidden_layers', 1)} "
                              f"layers of {layer.get('model_type')!r}: only eagle3 with one llama layer can be served")
    if other := [name for name in OTHER_NETWORKS if config.get(name)]:
        flags = ", ".join("--no-" + name.replace("_", "-") for name in other)
        raise CheckpointError(f"a speculators draft with {', '.join(other)} is another network than the engine runs: train it with {flags}")
    rope = layer.get("rope_parameters") or {"rope_theta": layer.get("rope_theta", 10_000.0)}
    window = layer.get("sliding_window")
    is_sliding = "sliding_attention" in (layer.get("layer_types") or ()) and window is not None
    if rope.get("rope_type", "default") != "default" or (is_sliding and window < layer.get("max_position_embeddings", 0)):
        raise CheckpointError("a speculators draft with scaled rotary positions or a sliding window shorter than its context: train it "
                              "with plain positions and --full-attention-indices 0")
    if missing := [name for name in SIZES if name not in layer]:
        raise CheckpointError(f"transformer_layer_config lacks {', '.join(missing)}: save the draft with speculators 0.9 or newer")
    ids = config.get("eagle_aux_hidden_state_layer_ids") or ()
    return {"architectures": [architecture], "draft_vocab_size": config["draft_vocab_size"], "rope_theta": rope["rope_theta"],
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": [i - 1 for i in ids]}, **{name: layer[name] for name in SIZES}}


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors under our names; those of another format as they are."""
    if not any(name.startswith(LAYER) for name in weights):
        return dict(weights)
    targets = ("embed_tokens.", "verifier_lm_head.", "verifier_norm.")
    ours = {f"midlayer.{name.removeprefix(LAYER)}" if name.startswith(LAYER) else name: tensor
            for name, tensor in weights.items() if not name.startswith(targets)}
    if "d2t" not in ours and "lm_head.weight" in ours:
        V = len(ours["lm_head.weight"])
        ours |= {"d2t": torch.zeros(V, dtype=torch.int64), "t2d": torch.ones(V, dtype=torch.bool)}
    return ours
