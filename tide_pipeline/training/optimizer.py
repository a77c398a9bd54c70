"""What moves the weights: parameter groups, and a learning rate that warms up and anneals to zero. Knows no data."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from tide_pipeline.config import TrainingSettings

OPTIMIZERS = ("adamw", "muon")
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
    "constant": lambda share: 1.0,
}


class Optimizer:
    """AdamW, or Muon for the matrices of the layer and AdamW for the rest, under one learning-rate factor."""

    def __init__(self, draft: nn.Module, settings: TrainingSettings) -> None:
        named = [(n, p) for n, p in draft.named_parameters() if p.requires_grad]
        matrices = [p for n, p in named if p.dim() == 2 and n != "lm_head.weight"] if settings.optimizer == "muon" else []
        taken = {id(p) for p in matrices}
        rest = [p for _, p in named if id(p) not in taken]
        self.names = {id(p): n for n, p in named}
        self.parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)]
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, lr=settings.muon_learning_rate, weight_decay=0.0))
        self.rates = [[group["lr"] for group in part.param_groups] for part in self.parts]

    def step(self, factor: float) -> None:
        """One update at `factor` times the set rates; clears the gradients."""
        for part, rates in zip(self.parts, self.rates, strict=True):
            for group, rate in zip(part.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            part.step()
            part.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its state, named `<parameter>/<entry>`."""
        return {f"{self.names[id(p)]}/{key}": torch.as_tensor(value)
                for part in self.parts for p, state in part.state.items() for key, value in state.items()}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take back what `tensors` gave."""
        for part in self.parts:
            for group in part.param_groups:
                for p in group["params"]:
                    prefix = f"{self.names[id(p)]}/"
                    part.state[p] = {name.removeprefix(prefix): t.clone() for name, t in tensors.items() if name.startswith(prefix)}


def rate_factor(step: int, share: float, warmup_steps: int, schedule: str = "linear") -> float:
    """Linear warm-up over the first steps, then what the schedule says of the budget; `share` is the spent part of it, time or steps."""
    return min(1.0, (step + 1) / max(warmup_steps, 1)) * SCHEDULES[schedule](min(share, 1.0))
