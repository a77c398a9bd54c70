"""A tiny engine folder for the TensorRT-LLM backend, with the stand-in where the server would be. The rest is real."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.helpers import write_tiny_target
from tests.serving import CONTEXT, Place
from tests.trtllm_stand_in.runtime.network import Network
from tide_pipeline.config import TideConfig, override
from tide_pipeline.engine_spec import load_engine_spec
from tide_pipeline.models.target import Target
from tide_pipeline.recipes import freeze

LAYERS = (0, 1, 2)
LENGTH = 3


def write_trtllm_place(folder: Path, line: str, values: Mapping[str, Any] | None = None, trtllm: str = "") -> Place:
    """As tests.serving.write_place: `folder/engines/tiny` says backend trtllm, version `line`; `trtllm` is more of its [trtllm] table."""
    engine = folder / "engines" / "tiny"
    write_tiny_target(engine / "target", max_positions=CONTEXT)
    raw = json.loads((engine / "target" / "config.json").read_text())
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
             "vocab_size", "max_position_embeddings")
    architecture = "".join(f"{name} = {raw[name]}\n" for name in names)
    engine.joinpath("engine.toml").write_text(
        f'name = "tiny"\nbackend = "trtllm"\nmodel = "target"\nrevision = "1"\ncapture_layers = {list(LAYERS)}\nsoft_targets = false\n'
        f'champion = ""\nmax_context = {CONTEXT}\nmax_draft_length = {LENGTH}\n[trtllm]\n{trtllm}\n[architecture]\n{architecture}')
    config = override(TideConfig(engine="tiny", engines_dir=str(folder / "engines"), state_dir=str(folder / "state")),
                      {**(values or {}), "serve": {"trtllm": line, **(values or {}).get("serve", {})}})
    freeze(config, folder / "tide.toml")
    return Place(config, folder / "tide.toml", Target(engine / "target", load_engine_spec(engine)))


class KnownNetwork:
    """What the stand-in computes, asked from outside."""

    def __init__(self, place: Place) -> None:
        self.network = Network.of(str(place.config.engine_dir / "target"))

    def continuation(self, prompt: Sequence[int], count: int, *, ends: bool = True) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(self.network.next_token(tokens))
            if ends and tokens[-1] == self.network.eos_id:
                break
        return tokens[len(prompt):]

    def states(self, tokens: Sequence[int], start: int = 0) -> Tensor:
        """bf16 [T, taps]."""
        return self.network.states(tokens, start, len(LAYERS))
