"""Of NVIDIA's model what a draft put in place touches: its first matrix, and how it is loaded. Tokens and states do not come from it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


class Weights(nn.Module):
    """`draft_model.fc`, in bf16; without it where the draft's folder holds none."""

    def __init__(self, draft: str | None) -> None:
        super().__init__()
        self.draft_model, self.loads = nn.Module(), 0
        file = Path(str(draft)) / "model.safetensors"
        held = load_file(str(file)).get("fc.weight") if file.is_file() else None
        if held is not None:
            self.draft_model.fc = nn.Linear(held.shape[1], held.shape[0], bias=False, dtype=torch.bfloat16)
            self.load_draft_weights({"fc.weight": held})

    def load_draft_weights(self, weights: dict[str, Tensor]) -> None:
        self.loads += 1
        with torch.no_grad():
            self.draft_model.fc.weight.copy_(weights["fc.weight"])
