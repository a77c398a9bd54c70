"""Greedy equivalence: every emitted token is the argmax of a plain pass over its prefix, or tied with it. Knows no engine and no build.

V = target vocabulary, N = output tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tide_pipeline.models.target import Target

ROUNDING = 2**-6                   # of a row's largest logit: passes of different shape round a bf16 logit to neighbours of each other


@dataclass
class Equivalence:
    """Tokens that were compared; those that are tied with the argmax, and those that are not the target's own."""

    compared: int = 0
    ties: int = 0
    mismatches: int = 0


def tolerance(logits_NV: Tensor, epsilon: float) -> Tensor:
    """[N]: how far below the argmax still counts as tied. `epsilon` in fp32; of 16 bits what rounding moves, where that is more."""
    flat_N = torch.full_like(logits_NV[:, 0], epsilon, dtype=torch.float32)
    return flat_N if logits_NV.dtype == torch.float32 else torch.maximum(flat_N, ROUNDING * logits_NV.float().abs().amax(-1))


@torch.inference_mode()
def check_equivalence(target: Target, prompt: Sequence[int], output: Sequence[int], epsilon: float, into: Equivalence,
                      plain: Sequence[int] = ()) -> None:
    """One plain pass over prompt and output judges every output token. Where plain decoding gave the same output, that was the pass."""
    into.compared += len(output)
    if tuple(output) == tuple(plain):
        return
    ids = torch.tensor([[*prompt, *output]])                           # ids and positions come from the host (models/device.py)
    T = ids.shape[1]
    _, final = target.forward(ids, torch.arange(T).unsqueeze(0), target.new_cache(1, T))
    logits_NV = target.logits(final[0, len(prompt) - 1 : -1])
    allowed_N, exact_NV = tolerance(logits_NV, epsilon), logits_NV.float()
    chosen_N = exact_NV.gather(1, torch.tensor(output, device=target.device).unsqueeze(1))[:, 0]
    gap_N = exact_NV.amax(-1) - chosen_N
    into.ties += int(((gap_N > 0) & (gap_N <= allowed_N)).sum())
    into.mismatches += int((~(gap_N <= allowed_N)).sum())              # NaN too
