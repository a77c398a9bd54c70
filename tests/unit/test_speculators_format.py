"""A draft that the speculators library saved loads as ours.

The config is laid out as speculators 0.9.0 with transformers 5.19 wrote it; the library itself runs in benchmarks/peer_speculators.py, in
an environment of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peer_sides import before_norm
from safetensors.torch import load_file, save_file

from tests.helpers import write_tiny_build
from tide_pipeline.errors import CheckpointError, EngineMismatch
from tide_pipeline.models.checkpoint import DraftIdentity, digest_draft, load_draft, read_identity
from tide_pipeline.models.target import Target

VOCABULARY = torch.arange(0, 200, 2)


def theirs(folder: Path, target: Target, vocabulary: torch.Tensor | None = VOCABULARY, **changes: Any) -> tuple[Path, Path]:
    """Our draft's folder, and the same draft as their trainer saves it, embeddings of the target included."""
    ours = Path(write_tiny_build(folder / "ours", target, vocabulary=vocabulary).path) / "draft"
    config = json.loads((ours / "config.json").read_text())
    sizes = {name: config[name] for name in ("hidden_size", "intermediate_size", "head_dim", "max_position_embeddings", "vocab_size",
                                             "num_attention_heads", "num_key_value_heads", "rms_norm_eps")}
    layer = {"attention_bias": False, "dtype": "bfloat16", "hidden_act": "silu", "model_type": "llama", "num_hidden_layers": 1,
             "rope_parameters": {"rope_theta": config["rope_theta"], "rope_type": "default"}, "tie_word_embeddings": False, **sizes}
    layer |= {name: changes.pop(name) for name in list(changes) if name in layer or name in ("sliding_window", "layer_types")}
    written = {"architectures": ["Eagle3DraftModel"], "draft_vocab_size": config["draft_vocab_size"], "speculators_model_type": "eagle3",
               "eagle_aux_hidden_state_layer_ids": [i + 1 for i in config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]],
               "embed_requires_grad": False, "fc_norm": False, "norm_before_fc": False, "norm_before_residual": False, "norm_output": False,
               "transformer_layer_config": layer} | changes
    weights = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in load_file(ours / "model.safetensors").items()}
    if vocabulary is None:
        del weights["d2t"], weights["t2d"]
    place = folder / "theirs"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(written))
    save_file(weights | {"embed_tokens.weight": target.embedding_VD.bfloat16().contiguous()}, place / "model.safetensors")
    return ours, place


@pytest.mark.parametrize("vocabulary", [VOCABULARY, None])
def test_their_draft_is_ours_by_other_names(tmp_path: Path, tiny_target: Target, vocabulary: torch.Tensor | None) -> None:
    ours, place = theirs(tmp_path, tiny_target, vocabulary)
    identity = DraftIdentity("tiny", tiny_target.digest, read_identity(ours).capture_layers)
    one, other = (load_draft(folder, tiny_target.shape, identity) for folder in (ours, place))
    assert one.shape == other.shape
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert digest_draft(place) != digest_draft(ours)


@pytest.mark.parametrize("changes", [
    {"norm_before_residual": True}, {"fc_norm": True}, {"norm_before_fc": True}, {"norm_output": True}, {"embed_requires_grad": True},
    {"speculators_model_type": "peagle"}, {"model_type": "qwen3"}, {"num_hidden_layers": 2},
    {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}}, {"layer_types": ["sliding_attention"], "sliding_window": 16}])
def test_another_network_is_refused(tmp_path: Path, tiny_target: Target, changes: dict[str, Any]) -> None:
    _, place = theirs(tmp_path, tiny_target, **changes)
    with pytest.raises(CheckpointError, match="speculators draft"):
        load_draft(place, tiny_target.shape)


def test_a_window_as_long_as_the_context_is_no_window(tmp_path: Path, tiny_target: Target) -> None:
    _, place = theirs(tmp_path, tiny_target, layer_types=["sliding_attention"], sliding_window=2048)
    load_draft(place, tiny_target.shape)


def test_other_layers_are_a_mismatch(tmp_path: Path, tiny_target: Target) -> None:
    ours, place = theirs(tmp_path, tiny_target, eagle_aux_hidden_state_layer_ids=[2, 3, 4])
    with pytest.raises(EngineMismatch, match="reads layers"):
        load_draft(place, tiny_target.shape, read_identity(ours))


def test_a_final_state_survives_the_way_through_their_norm(tiny_target: Target) -> None:
    """Their data set holds states before the last norm, the lake those behind it."""
    states_TD, norm_D = torch.randn(50, tiny_target.shape.hidden_size) * 30, tiny_target.norm.float()
    final_TD = torch.nn.functional.rms_norm(states_TD, states_TD.shape[-1:], norm_D, 1e-5).bfloat16()
    back_TD = torch.nn.functional.rms_norm(before_norm(final_TD, norm_D).float(), states_TD.shape[-1:], norm_D, 1e-5)
    assert float((back_TD - final_TD.float()).abs().max()) <= 2**-7 * float(final_TD.float().abs().max())
