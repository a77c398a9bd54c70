"""The KV cache and one decoder layer, shared by target and draft. Inference only; geometry.py says where a step's rows stand.

B = requests in the step, W = token rows of a request, N = rows of all of them, T = cached positions, D = hidden size,
H = query heads, K = key/value heads, E = size of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tide_pipeline.models.geometry import StepGeometry
from tide_pipeline.models.linear import Linear

if TYPE_CHECKING:
    from tide_pipeline.models.static import StaticPasses


@dataclass(frozen=True)
class Heads:
    query: int
    kv: int
    size: int

    @property
    def groups(self) -> int:
        """Query heads of a key/value head."""
        return self.query // self.kv


class KVCache:
    """Keys and values of `slots` requests: [layer, slot * position, 2K * E]. Slots 0..B-1 are the ones in a step.

    One row more stands behind them, to write what nobody reads. `static` runs passes of fixed shape, where the device wants them.
    """

    def __init__(self, layers: int, slots: int, positions: int, heads: Heads, device: torch.device | str = "cpu",
                 dtype: torch.dtype = torch.float32) -> None:
        self.slots, self.positions, self.heads, self.scratch = slots, positions, heads, slots * positions
        self.static: StaticPasses | None = None
        self.rows = torch.zeros(layers, self.scratch + 1, 2 * heads.kv * heads.size, device=device, dtype=dtype)

    def move(self, source: int, to: int, length: int) -> None:
        """Copy the first `length` positions of one slot over another, so that running slots stay packed."""
        P = self.positions
        self.rows[:, to * P : to * P + length] = self.rows[:, source * P : source * P + length]

    def keys_values(self, layer: int, first: int, B: int, T: int) -> tuple[Tensor, Tensor]:
        """Views [B, K, T, E] of slots first..first+B-1."""
        P, heads = self.positions, self.heads
        block = self.rows[layer, first * P : (first + B) * P].view(B, P, 2 * heads.kv, heads.size)[:, :T].transpose(1, 2)
        return block[:, : heads.kv], block[:, heads.kv :]


class DecoderLayer:
    """Attention and gated MLP with fused weights. `qkv` may read a wider input than D (the draft's 2D).

    Biases of the attention's products, and norms of query and key heads, are used where the weights hold them.
    """

    def __init__(self, weights: Mapping[str, Tensor], prefix: str, heads: Heads, eps: float) -> None:
        def fused(*names: str) -> Linear:
            parts = [weights[f"{prefix}{n}.weight"] for n in names]
            biases = [weights[f"{prefix}{n}.bias"] for n in names if f"{prefix}{n}.bias" in weights]
            assert len(biases) in (0, len(names))
            return Linear(torch.cat(parts) if len(parts) > 1 else parts[0], torch.cat(biases) if biases else None)

        self.heads, self.eps = heads, eps
        self.qkv = fused("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.out = fused("self_attn.o_proj")
        self.gate_up = fused("mlp.gate_proj", "mlp.up_proj")
        self.down = fused("mlp.down_proj")
        self.post_norm = weights[f"{prefix}post_attention_layernorm.weight"]
        self.head_norms: Tensor | None = None                     # [H + K, E]
        if f"{prefix}self_attn.q_norm.weight" in weights:
            q, k = (weights[f"{prefix}self_attn.{n}_norm.weight"] for n in "qk")
            self.head_norms = torch.cat((q.expand(heads.query, -1), k.expand(heads.kv, -1)))

    def attend(self, x_ND: Tensor, cache: KVCache, layer: int, at: StepGeometry) -> Tensor:
        """Self-attention of the step's rows over the cache, which gains their keys and values: [N, in] -> [N, D]."""
        heads, groups = self.heads, self.heads.groups
        qkv = self.qkv(x_ND).view(-1, heads.query + 2 * heads.kv, heads.size)
        turned = qkv[:, : heads.query + heads.kv]
        if self.head_norms is not None:
            torch.mul(F.rms_norm(turned, turned.shape[-1:], None, self.eps), self.head_norms, out=turned)
        rolled = torch.cat((turned[..., heads.size // 2 :], turned[..., : heads.size // 2]), dim=-1)
        turned.mul_(at.cos).addcmul_(rolled, at.sin)
        cache.rows[layer].index_copy_(0, at.cache_rows, qkv[:, heads.query :].flatten(1))
        keys, values = cache.keys_values(layer, at.first_slot, at.B, at.T)
        q_NHE = qkv[:, : heads.query] if at.pad is None else qkv[:, : heads.query][at.pad]
        q = q_NHE.view(at.B, at.W, heads.kv, groups, heads.size).permute(0, 2, 3, 1, 4)
        q = q.reshape(at.B, heads.kv, groups * at.W, heads.size)
        o = F.scaled_dot_product_attention(q, keys, values, attn_mask=at.mask)
        o = o.view(at.B, heads.kv, groups, at.W, heads.size).permute(0, 3, 1, 2, 4)
        o_NH = o.reshape(at.B * at.W, heads.query * heads.size)
        return self.out(o_NH if at.unpad is None else o_NH[at.unpad])

    def feed_forward(self, x_ND: Tensor) -> Tensor:
        gate, up = self.gate_up(F.rms_norm(x_ND, x_ND.shape[-1:], self.post_norm, self.eps)).chunk(2, dim=-1)
        return self.down(F.silu(gate).mul_(up))
