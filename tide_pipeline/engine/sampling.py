"""Choose and verify tokens. Knows distributions and random keys; no network, no requests.

Speculative sampling (Leviathan et al. 2023): a draft token x ~ q is kept with probability min(1, p(x) / q(x)); the first
one refused is replaced by a draw from the residual max(0, p - q). What comes out is distributed as p, whatever q is.
Every uniform number is a function of (seed, position, purpose), so a token's draw does not depend on batch or timing.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from tide_pipeline.contracts import SamplingParams


class Purpose(IntEnum):
    DRAFT = 1
    ACCEPT = 2
    EMIT = 3                 # the residual or bonus token, and every token of plain decoding


NUCLEUS_HEAD = 256         # tokens that top-p looks at first

_MASK = (1 << 64) - 1


def uniform(seed: int, position: int, purpose: Purpose) -> float:
    """A number in [0, 1) keyed by (seed, position, purpose): SplitMix64's finaliser over a mixed key."""
    z = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03 + int(purpose) * 0x8CB92BA72F3D8DD7) & _MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ (z >> shift)) * factor) & _MASK
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)


def distribution(logits_NV: Tensor, how: SamplingParams) -> Tensor:
    """Probabilities after temperature, top-k and top-p, fp64: [N, V] -> [N, V]. Temperature must be above 0."""
    scaled = logits_NV.double()
    scaled = (scaled - scaled.amax(-1, keepdim=True)) / how.temperature    # the largest is 0: no temperature overflows
    if 0 < how.top_k < scaled.shape[-1]:
        kth = scaled.topk(how.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < kth, float("-inf"))
    p = scaled.softmax(-1)
    return p if how.top_p >= 1.0 else _nucleus(p, how.top_p)


def _nucleus(p_NV: Tensor, top_p: float) -> Tensor:
    """The likeliest tokens up to the one that crosses top_p, renormalised. The whole vocabulary is sorted only when it must be."""
    head, order = p_NV.topk(min(NUCLEUS_HEAD, p_NV.shape[-1]), dim=-1)
    if float(head.sum(-1).amin()) < top_p:
        head, order = p_NV.sort(dim=-1, descending=True)
    beyond = head.cumsum(-1) - head >= top_p
    kept = torch.zeros_like(p_NV).scatter_(-1, order, head.masked_fill(beyond, 0.0))
    return kept / kept.sum(-1, keepdim=True)


def draw(p_V: Tensor, u: float) -> int:
    """The token whose share of the cumulative distribution holds u."""
    cumulative = p_V.cumsum(-1)
    token = int(torch.searchsorted(cumulative, u * float(cumulative[-1]), right=True))
    return min(token, int(p_V.nonzero()[-1]))


def accept_greedy(drafted: Sequence[int], argmax: Sequence[int]) -> tuple[int, list[int]]:
    """Accepted count and emitted tokens: draft token i is kept while it is the target's argmax of row i."""
    n = 0
    while n < len(drafted) and drafted[n] == argmax[n]:
        n += 1
    return n, [*drafted[:n], argmax[n]]


def accept_sampled(drafted: Sequence[int], q_KV: Tensor | None, p_WV: Tensor, seed: int, position: int) -> tuple[int, list[int]]:
    """Accepted count and emitted tokens for draft tokens drawn from q; `position` is that of drafted[0].

    p has one more row than there are draft tokens: the last is the bonus token's distribution.
    """
    for i, token in enumerate(drafted):
        assert q_KV is not None
        p, q = p_WV[i], q_KV[i]
        if uniform(seed, position + i, Purpose.ACCEPT) < min(1.0, float(p[token] / q[token])):
            continue
        residual = (p - q).clamp_(min=0)
        if float(residual.sum()) <= 0.0:                            # p == q up to rounding: any refusal is rounding too
            residual = p
        return i, [*drafted[:i], draw(residual, uniform(seed, position + i, Purpose.EMIT))]
    n = len(drafted)
    return n, [*drafted, draw(p_WV[n], uniform(seed, position + n, Purpose.EMIT))]
