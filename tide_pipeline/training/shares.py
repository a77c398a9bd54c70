"""Who keeps what of a team's training state: every trained tensor has one owner, and its optimizer state and average are held there alone.

    gradients    summed at the owner, and dropped elsewhere
    update       by the owner, which hands the new weights to all
    snapshot     collected at the first process, so that it is the same file whatever the team: one of another size can go on with it

This is the first stage of ZeRO (arXiv 1910.02054), dealt out by whole tensors because Muon needs whole matrices. The weights and, until
they are summed, the gradients are whole in every process. A process alone owns everything. Knows no optimizer and no data.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from tide_pipeline.engine.memory import deal
from tide_pipeline.training.team import Team


class Shares:
    """The trained tensors of a draft among the processes of a team; all of them decide alike."""

    def __init__(self, draft: nn.Module, team: Team) -> None:
        self.team = team
        self.trained = {name: p for name, p in draft.named_parameters() if p.requires_grad}
        self.owners = deal([p.numel() for p in self.trained.values()], team.size)

    @property
    def mine(self) -> dict[str, nn.Parameter]:
        """The tensors that this process owns, by name."""
        return {name: p for (name, p), owner in zip(self.trained.items(), self.owners, strict=True) if owner == self.team.rank}

    def sum_gradients(self, clip_norm: float) -> float:
        """Leave the gradient of the whole batch with the owners, clipped to `clip_norm` (0: not at all); returns its norm before that."""
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        assert len(gradients) == len(self.owners), "a trained tensor without a gradient"
        self.team.sum_at(self.owners, gradients)
        norms = torch.zeros(len(gradients), device=self.team.device)
        for i, (p, owner) in enumerate(zip(self.trained.values(), self.owners, strict=True)):
            if owner == self.team.rank:
                norms[i] = torch.linalg.vector_norm(gradients[i])
            else:
                p.grad = None
        self.team.add_up([norms])                                          # one number each, and zeros of the others: exact
        norm = torch.linalg.vector_norm(norms)
        torch.nn.utils.clip_grads_with_norm_(list(self.mine.values()), clip_norm if clip_norm > 0 else math.inf, norm)
        return float(norm)

    @torch.no_grad()
    def hand_out(self) -> None:
        """Every trained tensor as its owner has it, to all."""
        self.team.hand_out(self.owners, [p.detach() for p in self.trained.values()])
