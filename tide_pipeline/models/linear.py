"""A matrix product that is quick for a few rows on a CPU. Knows no network.

Decoding reads every weight once a step, so it is bound by bytes: weights of 16 bits are read twice as fast as those of 32, and the pocket
target then fits into the cache. FBGEMM's product takes them with inputs and sums in 32 bits. A weight that bf16 can hold is exact in
fp16 unless it is tiny (below 6e-5, off by 3e-8 at most), and a row's result does not depend on how many rows are multiplied with it,
so a verified token sees the same product as a decoded one. benchmarks/README.md and docs/LOG.md have the figures.

PyTorch has announced that it will drop the operator: it is tried and compared at construction, and where it is missing or differs, as on
processors that are not x86, the plain product serves.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TINY = 2.0**-24                  # half a step of fp16 near zero: what the cast may lose of a weight


class Linear:
    """y = x W^T + b for weights [out, in], a bias [out] or none, and fp32 inputs [N, in]. Inference only."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        self.packed: Any = _pack(weight_OI)
        self.weight = weight_OI.contiguous() if self.packed is None else None
        self.bias = bias_O

    def __call__(self, x_NI: Tensor) -> Tensor:
        if self.weight is not None:
            return F.linear(x_NI, self.weight, self.bias)
        out: Tensor = torch.fbgemm_linear_fp16_weight_fp32_activation(x_NI, self.packed, self.bias)
        return out


def _pack(weight_OI: Tensor) -> Any | None:
    if weight_OI.device.type != "cpu" or weight_OI.dtype != torch.float32 or (weight_OI.half().float() - weight_OI).abs().max() > TINY:
        return None
    x = torch.linspace(-1, 1, 3 * weight_OI.shape[1]).view(3, -1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fbgemm", UserWarning)          # told once a process, here
            packed = torch.fbgemm_pack_gemm_matrix_fp16(weight_OI.contiguous())
            got = torch.fbgemm_linear_fp16_weight_fp32_activation(x, packed, None)
    except (AttributeError, RuntimeError, TypeError):
        return None
    want = F.linear(x, weight_OI)
    return packed if torch.allclose(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max() + 1e-6)) else None
