"""An exponential moving average of the weights while they are trained (EMA). Knows no optimizer and no data."""

from __future__ import annotations

import torch
from torch import Tensor

from tide_pipeline.models.eagle3 import Eagle3Draft

RAMP = 10.0                        # the first averages are short ones: decay (1 + n) / (RAMP + n) after n updates


class Average:
    """Off at decay 0: holds nothing and costs nothing."""

    def __init__(self, draft: Eagle3Draft, decay: float) -> None:
        self.decay = decay
        named = {name: p for name, p in draft.named_parameters() if p.requires_grad} if decay > 0 else {}
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
