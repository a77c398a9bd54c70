"""The draft run on its own output, many rows at once and differentiable: training-time test of EAGLE-3. Knows no loss.

    row         0    1    2    3        row t stands at one position and has the token after it, x_{t+1}
    step 0     s0   s1   s2   s3        from the true taps: s_t = layer(fc(g_t), x_{t+1})
    step 1          s0'  s1'  s2'       row t from the state of row t-1 one step earlier
    step 2               s0'' s1''

So the row t of step j is the j-th token drafted after anchor row t-j. It may look at the true keys of rows 0..t-j and
at the keys its own chain left: those of step i at row t-j+i, for i = 1..j. This is what `DraftRunner` computes with a
KV cache, one anchor at a time (tests/unit/test_training_unroll.py).

B = batch rows, T = token rows, D = hidden size, K = key/value heads, G = query heads per key head, E = size of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tide_pipeline.models.eagle3 import Eagle3Draft


def shift_rows(x_BT: Tensor, by: int) -> Tensor:
    """Row t gets the value of row t-by. The first rows keep something finite that nothing valid reads."""
    return x_BT if by == 0 else torch.cat((x_BT[:, :by], x_BT[:, :-by]), dim=1)


class Unroll:
    """One batch on its way through the draft: every call of `step` goes one drafted token deeper, at all rows."""

    def __init__(self, draft: Eagle3Draft, embedding_VD: Tensor, taps_BTG: Tensor, positions_BT: Tensor, segments_BT: Tensor) -> None:
        """`segments` separates the windows packed into one batch row; rows of one segment are consecutive."""
        self.draft, self.embedding_VD = draft, embedding_VD
        w = self.w = {name.removesuffix(".weight"): p for name, p in draft.midlayer.named_parameters()}
        self.qkv = torch.cat([w[f"self_attn.{n}_proj"] for n in "qkv"])
        self.gate_up = torch.cat((w["mlp.gate_proj"], w["mlp.up_proj"]))
        self.states_BTD: Tensor = draft.fc(taps_BTG.to(draft.fc.weight.dtype)).float()      # the residual stream stays fp32 under autocast
        self.depth = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.cos, self.sin = draft.cos[positions_BT].unsqueeze(2), draft.sin[positions_BT].unsqueeze(2)
        T = positions_BT.shape[1]
        rows_T = torch.arange(T, device=positions_BT.device)
        lag_BTT = (rows_T.unsqueeze(1) - rows_T).expand(len(positions_BT), T, T)
        self.lag_BTT = lag_BTT.masked_fill(segments_BT.unsqueeze(2) != segments_BT.unsqueeze(1), -1)

    def step(self, next_ids_BT: Tensor) -> Tensor:
        """Go one token deeper; `next_ids` is the token after each row. Returns the draft's output states [B, T, D]."""
        hidden = self.states_BTD if self.depth == 0 else shift_rows(self.states_BTD, 1)
        embedded = self._norm("input_layernorm", F.embedding(next_ids_BT, self.embedding_VD))
        x = hidden + self._attend(torch.cat((embedded, self._norm("hidden_norm", hidden)), dim=-1))
        x = x + self._feed_forward(self._norm("post_attention_layernorm", x))
        self.states_BTD = x
        self.depth += 1
        return x

    def only_from(self, row: int) -> None:
        """After the first step: leave out the rows before `row`, whose own chains nobody reads. Their true keys stay."""
        assert self.depth == 1
        self.states_BTD, self.lag_BTT = self.states_BTD[:, row:], self.lag_BTT[:, row:]
        self.cos, self.sin = self.cos[:, row:], self.sin[:, row:]

    def _attend(self, x_BTI: Tensor) -> Tensor:
        """Softmax over the true keys at distance >= depth and one key of each earlier step of the row's own chain."""
        heads = self.draft.shape.heads
        B, T, _ = x_BTI.shape
        K, E, G = heads.kv, heads.size, heads.query // heads.kv
        q, k, v = F.linear(x_BTI, self.qkv).view(B, T, K * G + 2 * K, E).tensor_split((K * G, K * G + K), dim=2)
        q = self._rotate(q).view(B, T, K, G, E) * E**-0.5
        self.keys.append(self._rotate(k))
        self.values.append(v)
        q_BKR = q.permute(0, 2, 3, 1, 4).reshape(B, K, G * T, E)
        scores = q_BKR @ self.keys[0].permute(0, 2, 3, 1)               # [B, K, G * T, S]; S is T until `only_from`
        S = scores.shape[-1]
        hidden = (self.lag_BTT < self.depth).unsqueeze(1)
        scores = scores.view(B, K, G, T, S).masked_fill(hidden.unsqueeze(1), float("-inf"))
        chain = range(1, self.depth + 1)
        own = [(q * shift_rows(self.keys[i], self.depth - i).unsqueeze(3)).sum(-1).permute(0, 2, 3, 1) for i in chain]
        p = torch.cat((scores, torch.stack(own, dim=-1)), dim=-1).softmax(dim=-1) if own else scores.softmax(dim=-1)
        o = (p[..., :S].reshape(B, K, G * T, S) @ self.values[0].transpose(1, 2)).view(B, K, G, T, E).permute(0, 3, 1, 2, 4)
        for i in chain:
            o = o + p[..., S + i - 1].permute(0, 3, 1, 2).unsqueeze(-1) * shift_rows(self.values[i], self.depth - i).unsqueeze(3)
        return F.linear(o.reshape(B, T, K * G * E), self.w["self_attn.o_proj"])

    def _feed_forward(self, x_BTD: Tensor) -> Tensor:
        gate, up = F.linear(x_BTD, self.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.w["mlp.down_proj"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.w[name], self.draft.shape.eps)

    def _rotate(self, x_BTHE: Tensor) -> Tensor:
        half = x_BTHE.shape[-1] // 2
        return x_BTHE * self.cos + torch.cat((x_BTHE[..., half:], x_BTHE[..., :half]), dim=-1) * self.sin
