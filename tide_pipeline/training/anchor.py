"""The champion's share of what is exported: trained weights, moved a little of the way back to where they began. Knows no data.

Training on a shift moves weights that old workloads need, and replays few of their prompts many times over. On the straight line between
the two sets of weights, the first tenth of the way back costs the new workload next to nothing and gives old ones much of it back
(WiSE-FT, arXiv 2109.01903; measured in docs/training.md).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Anchor:
    """Off at share 0: holds nothing."""

    def __init__(self, trained: Mapping[str, nn.Parameter], share: float) -> None:
        """To be made before the first step; keeps a copy in host memory."""
        self.trained, self.share = trained, share
        self.begun: dict[str, Tensor] = {name: p.detach().to("cpu", copy=True) for name, p in trained.items()} if share > 0 else {}

    @torch.no_grad()
    def pull(self) -> None:
        """Move the weights back by `share` of the way."""
        for name, begun in self.begun.items():
            self.trained[name].lerp_(begun.to(self.trained[name].device), self.share)
