"""A matrix that is quick for a few rows on a CPU. Knows no network.

Verification multiplies 2 to 50 rows by each weight. PyTorch's default fp32 product there costs more than twice the
one-row product; oneDNN with weights packed once costs about the same as one row, and that is what makes speculation
pay on a CPU (benchmarks/README.md). The packed product is an operator that Inductor uses and PyTorch does not document:
it is tried and compared at construction, and where it is missing or differs the plain product serves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PACKED_ROWS = 4                  # the number of rows that weights are packed for
PACK_FROM = 100_000              # elements; below, the call itself costs more than packing saves


class Linear:
    """y = x W^T for weights [out, in]; picks the product by the number of rows. Inference only."""

    def __init__(self, weight_OI: Tensor) -> None:
        rows_out, rows_in = weight_OI.shape
        # One row: a wide matrix is read faster column-wise.
        self.weight = weight_OI.t().contiguous().t() if rows_out > rows_in else weight_OI.contiguous()
        worth_it = weight_OI.numel() >= PACK_FROM and weight_OI.device.type == "cpu" and weight_OI.dtype == torch.float32
        self.packed = _pack(weight_OI) if worth_it else None

    def __call__(self, x_NI: Tensor) -> Tensor:
        if self.packed is None or x_NI.shape[0] == 1:
            return F.linear(x_NI, self.weight)
        rows = x_NI.shape[0]
        if rows < PACKED_ROWS and self.weight.shape[0] > self.weight.shape[1]:
            x_NI = F.pad(x_NI, (0, 0, 0, PACKED_ROWS - rows))      # oneDNN's kernels for 2 and 3 rows are slower than that for 4
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x_NI, self.packed, None, "none", [], "")
        return out[:rows]


def _pack(weight_OI: Tensor) -> Tensor | None:
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), PACKED_ROWS)
        x = torch.linspace(-1, 1, 3 * weight_OI.shape[1]).view(3, -1)
        got = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return None
    want = F.linear(x, weight_OI)
    return packed if torch.allclose(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max() + 1e-6)) else None
