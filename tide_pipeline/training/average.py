"""An exponential moving average of the weights while they are trained (EMA). Knows no optimizer and no data."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

RAMP = 10.0                        # the first averages are short ones: decay (1 + n) / (RAMP + n) after n updates


class Average:
    """Off at decay 0: holds nothing and costs nothing."""

    def __init__(self, trained: Mapping[str, nn.Parameter], decay: float) -> None:
        """Of the tensors `trained`, by name; of a team, those that this process owns."""
        self.decay = decay
        named = trained if decay > 0 else {}
        self.live = list(named.values())
        self.held: dict[str, Tensor] = {name: p.detach().clone() for name, p in named.items()}

    def update(self, step: int) -> None:
        """After update number `step` (from 0)."""
        if self.live:
            decay = min(self.decay, (1 + step) / (RAMP + step))
            torch._foreach_lerp_(list(self.held.values()), [p.detach() for p in self.live], 1 - decay)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take back `held`, as a checkpoint kept it."""
        for name, tensor in self.held.items():
            tensor.copy_(tensors[name])
