"""The product of 16-bit weights is the plain one's, row by row, and the plain one serves where it is not."""

from __future__ import annotations

import platform
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tide_pipeline.models.linear import TINY, Linear

SIZES = [(48, 32), (32, 48), (257, 32), (33, 17), (1, 8), (704, 256)]
with_operator = pytest.mark.skipif(platform.machine() != "x86_64", reason="PyTorch has its product of 16-bit weights on x86-64 alone")


def bf16_weights(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


@with_operator
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_weights_of_bf16_are_packed_and_lose_nothing_but_rounding(size: tuple[int, int], biased: bool) -> None:
    weight, bias = bf16_weights(*size), bf16_weights(size[0], seed=1) if biased else None
    product = Linear(weight, bias)
    assert product.packed is not None and product.weight is None
    for rows in (1, 2, 5, 16, 33):
        x = torch.randn(rows, size[1], generator=torch.Generator().manual_seed(rows))
        want = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        most = F.linear(x.abs(), weight.abs(), None if bias is None else bias.abs()).double()      # what fp32 may round off grows with it
        assert ((product(x) - want).abs() <= most * size[1] ** 0.5 * 2**-23).all()


@with_operator
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_row_among_others_is_bitwise_the_row_alone(size: tuple[int, int]) -> None:
    product = Linear(bf16_weights(*size), bf16_weights(size[0], seed=1))
    x = torch.randn(64, size[1], generator=torch.Generator().manual_seed(2))
    alone = torch.cat([product(row.unsqueeze(0)) for row in x])
    for rows in range(1, 65):
        assert product(x[:rows]).equal(alone[:rows]), f"{rows} rows"


@with_operator
def test_inputs_too_large_for_fp16_stay_fp32() -> None:
    weight, x = bf16_weights(8, 6), torch.full((2, 6), 3e6)
    torch.testing.assert_close(Linear(weight)(x), F.linear(x, weight))


@pytest.mark.parametrize("change", [
    lambda w: w + 2**-14,                                          # more digits than fp16 has
    lambda w: w.index_fill(1, torch.tensor([3]), 7e4),             # too large for fp16
    lambda w: w.index_fill(1, torch.tensor([3]), 1 + 2**-12),      # one column is enough
], ids=["digits", "large", "one column"])
def test_weights_that_fp16_would_change_are_not_packed(change: Callable[[Tensor], Tensor]) -> None:
    weight, bias, x = change(bf16_weights(8, 6)), torch.randn(8), torch.randn(5, 6)
    product = Linear(weight, bias)
    assert product.packed is None
    assert product(x).equal(F.linear(x, weight, bias))


@with_operator
def test_a_tiny_weight_may_lose_half_a_step_of_fp16() -> None:
    weight = torch.eye(4) + 2.0**-24 * (1 - torch.eye(4)) * 1.25    # bf16 holds it, fp16 rounds it
    product, x = Linear(weight), torch.ones(1, 4)
    assert product.packed is not None
    assert float((product(x) - F.linear(x, weight)).abs().max()) <= 4 * TINY + 2**-22      # and fp32's own rounding near 1


@pytest.mark.parametrize("operator", ["fbgemm_pack_gemm_matrix_fp16", "fbgemm_linear_fp16_weight_fp32_activation"])
def test_without_the_operator_the_plain_product_serves(monkeypatch: pytest.MonkeyPatch, operator: str) -> None:
    monkeypatch.delattr(torch, operator)
    weight, bias, x = bf16_weights(8, 6), torch.randn(8), torch.randn(5, 6)
    product = Linear(weight, bias)
    assert product.packed is None and product(x).equal(F.linear(x, weight, bias))


def _refuses(*_: object) -> Tensor:
    raise RuntimeError("FBGEMM is not on this processor")


def _takes_other_arguments(*_: object) -> Tensor:
    raise TypeError("argument 'bias' must be Tensor, not NoneType")


@with_operator
@pytest.mark.parametrize("product", [_refuses, _takes_other_arguments, lambda x, packed, bias: torch.zeros(x.shape[0], 8)],
                         ids=["refuses", "takes other arguments", "differs"])
def test_an_operator_that_fails_or_differs_is_not_used(monkeypatch: pytest.MonkeyPatch, product: Callable[..., Tensor]) -> None:
    monkeypatch.setattr(torch, "fbgemm_linear_fp16_weight_fp32_activation", product)
    weight, x = bf16_weights(8, 6), torch.randn(5, 6)
    assert Linear(weight).packed is None and Linear(weight)(x).equal(F.linear(x, weight))
