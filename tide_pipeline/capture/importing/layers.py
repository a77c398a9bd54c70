"""Which layers a dump holds, by running the target over the beginning of a sequence. Knows the target; knows no formats and no lake.

No format writes down its layers, and they count differently: engine.toml, TensorRT-LLM and Model-Optimizer from 0 (the output of the
first layer), vLLM from 1 (0 is the embedding). One layer off is the classic silent bug: nothing fails, acceptance is just low.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tide_pipeline.capture.importing.fit import Fitted
from tide_pipeline.engine_spec import EngineSpec
from tide_pipeline.errors import EngineMismatch
from tide_pipeline.models.target import Target

ROWS = 48                          # of a sequence
MAX_ERROR = 0.25                   # of a row's norm: bf16 and kernels cost about 0.01, 8-bit serving more, another layer or model far more


class LayerCheck:
    """The target with every layer tapped."""

    def __init__(self, folder: Path, spec: EngineSpec, num_layers: int) -> None:
        self._wanted = spec.capture_layers
        self._target = Target(folder, dataclasses.replace(spec, capture_layers=tuple(range(num_layers))))

    def check(self, fitted: Fitted) -> None:
        """Raises EngineMismatch, naming the layer that each of the dump's really is."""
        D, tokens = self._target.shape.hidden_size, fitted.token_ids[:-1][:ROWS]
        taps_TG, final_TD = self._target.forward(torch.tensor([tokens]), torch.arange(len(tokens)).unsqueeze(0),
                                                 self._target.new_cache(1, len(tokens)))
        outputs = taps_TG[0].view(len(tokens), -1, D).unbind(1)
        states = fitted.rows_TW[:len(tokens)].float().view(len(tokens), -1, D).unbind(1)
        found = [_nearest(state_TD, outputs) for state_TD in states[:len(self._wanted)]]
        if any(layer != wanted or error > MAX_ERROR for (layer, error), wanted in zip(found, self._wanted, strict=True)):
            told = ", ".join(f"{layer} (off by {error:.1%})" for layer, error in found)
            raise EngineMismatch(f"the dump's layers look like the outputs of layers {told} of the target, engine.toml captures "
                                 f"{', '.join(map(str, self._wanted))}, counted from 0: dump those (vLLM's ids are one higher)")
        if self._target.spec.soft_targets and (error := _error(states[-1], final_TD[0])) > MAX_ERROR:
            raise EngineMismatch(f"the dump's final state is {error:.1%} off the target's: dump the state after its last layer (vLLM: "
                                 f"id {len(outputs)})")


def _nearest(state_TD: Tensor, outputs: Sequence[Tensor]) -> tuple[int, float]:
    errors = [_error(state_TD, output_TD) for output_TD in outputs]
    best = min(range(len(errors)), key=errors.__getitem__)
    return best, errors[best]


def _error(state_TD: Tensor, output_TD: Tensor) -> float:
    """Median over rows: first tokens carry states a hundred times as large."""
    return float(((state_TD - output_TD).norm(dim=-1) / output_TD.norm(dim=-1)).median())
