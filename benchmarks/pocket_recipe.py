"""The recipe that trained the pocket target, where benchmarks can import it. Trains nothing by itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "engines" / "pocket"))

from recipe.corpus import DOMAINS
from recipe.export import export_target
from recipe.target import Target, TargetSchedule, TargetShape, train_target
from recipe.tokenizer import DOMAIN_TOKENS, END_OF_TEXT

__all__ = ["DOMAINS", "DOMAIN_TOKENS", "END_OF_TEXT", "TargetSchedule", "TargetShape", "export_target", "train_target", "trained_network"]


def trained_network(folder: Path, device: torch.device) -> Target:
    """An exported target as the network that was trained, in fp32."""
    config = json.loads((folder / "config.json").read_text())
    shape = TargetShape(**{name: config[name] for name in TargetShape.__dataclass_fields__ if name in config})
    net = Target(shape, config["num_hidden_layers"])
    net.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()})
    return net.to(device).eval()
