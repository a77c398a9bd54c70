"""What moves the weights: parameter groups, and a learning rate that warms up and anneals to zero. Knows no data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from tide_pipeline.config import TrainingSettings

OPTIMIZERS = ("adamw", "muon")
HELD = 0.6                         # part of the budget that "hold" keeps the full rate for, before it falls linearly to zero
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
    "hold": lambda share: min(1.0, (1.0 - share) / (1.0 - HELD)),
    "constant": lambda share: 1.0,
}


class Optimizer:
    """AdamW, or Muon for the matrices of the layer and AdamW for the rest, under one learning-rate factor."""

    def __init__(self, trained: Mapping[str, nn.Parameter], settings: TrainingSettings) -> None:
        """Of the tensors `trained`, by name; of a team, those that this process owns."""
        matrices = [p for n, p in trained.items() if p.dim() == 2 and n != "lm_head.weight"] if settings.optimizer == "muon" else []
        taken = {id(p) for p in matrices}
        rest = [p for p in trained.values() if id(p) not in taken]
        self.names = {id(p): n for n, p in trained.items()}
        self.parts: list[torch.optim.Optimizer] = []
        if rest:
            self.parts.append(torch.optim.AdamW(rest, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0))
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
        """Take back what `tensors` gave, its own part of it; to where the parameters are, but for the counts of steps."""
        for part in self.parts:
            for group in part.param_groups:
                for p in group["params"]:
                    prefix = f"{self.names[id(p)]}/"
                    part.state[p] = {name.removeprefix(prefix): t.clone() if t.dim() == 0 else t.to(p.device, copy=True)
                                     for name, t in tensors.items() if name.startswith(prefix)}


def rate_factor(step: int, share: float, warmup_steps: int, schedule: str = "linear") -> float:
    """Linear warm-up over the first steps, then what the schedule says of the budget; `share` is the spent part of it, time or steps."""
    return min(1.0, (step + 1) / max(warmup_steps, 1)) * SCHEDULES[schedule](min(share, 1.0))
