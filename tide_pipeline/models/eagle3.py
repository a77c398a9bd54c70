"""The EAGLE-3 draft: its parameters (trainable), and a runner that drafts with a KV cache. Knows no files.

    tokens   x0  x1  x2  x3        row t takes (g_t, embedding of x_{t+1}) and predicts x_{t+2}
    taps     g0  g1  g2            the runner's position of row t is t

Row t's first input is fc(g_t) where the target's taps exist, and the draft's own output state where they do not yet
(the second and later drafted tokens of a round). Source: EAGLE-3 (arXiv 2503.01840) and the checkpoint layout of
facts on TensorRT-LLM in docs/engine.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tide_pipeline.models.device import to_device
from tide_pipeline.models.geometry import StepGeometry, StepRows
from tide_pipeline.models.layers import DecoderLayer, Heads, KVCache
from tide_pipeline.models.linear import Linear
from tide_pipeline.models.rope import Rope, rotary_tables
from tide_pipeline.models.static import new_cache

STATIC_WIDTH = 8                  # rows of a request: a usual catch-up, and every drafted token


@dataclass(frozen=True)
class DraftShape:
    """Everything the parameters' shapes follow from."""

    hidden_size: int
    num_taps: int
    heads: Heads
    intermediate_size: int
    vocab_size: int                # of the target
    draft_vocab_size: int
    max_positions: int
    rope_theta: float
    eps: float


class Eagle3Draft(nn.Module):
    """Parameters under the names TensorRT-LLM, SGLang and vLLM load. The embeddings are the target's and not held here."""

    d2t: Tensor                    # [draft vocabulary] int64: target id = draft id + d2t[draft id]
    t2d: Tensor                    # [target vocabulary] bool: has a draft id
    cos: Tensor
    sin: Tensor

    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        self.shape = shape
        D, q, kv = shape.hidden_size, shape.heads.query * shape.heads.size, shape.heads.kv * shape.heads.size
        self.fc = nn.Linear(shape.num_taps * D, D, bias=False)
        self.midlayer = nn.ModuleDict({
            "self_attn": nn.ModuleDict({"q_proj": nn.Linear(2 * D, q, bias=False), "k_proj": nn.Linear(2 * D, kv, bias=False),
                                        "v_proj": nn.Linear(2 * D, kv, bias=False), "o_proj": nn.Linear(q, D, bias=False)}),
            "mlp": nn.ModuleDict({"gate_proj": nn.Linear(D, shape.intermediate_size, bias=False),
                                  "up_proj": nn.Linear(D, shape.intermediate_size, bias=False),
                                  "down_proj": nn.Linear(shape.intermediate_size, D, bias=False)}),
            "hidden_norm": nn.RMSNorm(D, eps=shape.eps), "input_layernorm": nn.RMSNorm(D, eps=shape.eps),
            "post_attention_layernorm": nn.RMSNorm(D, eps=shape.eps)})
        self.norm = nn.RMSNorm(D, eps=shape.eps)
        self.lm_head = nn.Linear(D, shape.draft_vocab_size, bias=False)
        self.register_buffer("d2t", torch.zeros(shape.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.ones(shape.vocab_size, dtype=torch.bool))
        cos, sin = rotary_tables(Rope(shape.rope_theta), shape.heads.size, shape.max_positions + 16)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def set_vocabulary(self, target_ids: Tensor) -> None:
        """Draft token i stands for target token target_ids[i] (sorted, unique): d2t[i] = target_ids[i] - i."""
        assert target_ids.shape == (self.shape.draft_vocab_size,)
        self.d2t.copy_(target_ids - torch.arange(len(target_ids)))
        self.t2d.zero_()
        self.t2d[target_ids] = True


class DraftRunner:
    """Drafts for the requests of a step, where the target's embeddings are and in their dtype. Ids and positions come from the host."""

    def __init__(self, draft: Eagle3Draft, embedding_VD: Tensor) -> None:
        s = self.shape = draft.shape
        self.embedding_VD, self.device, self.dtype = embedding_VD, embedding_VD.device, embedding_VD.dtype
        weights = {name: tensor.detach().to(self.device, self.dtype) for name, tensor in draft.state_dict().items()
                   if tensor.is_floating_point()}
        self.fc = Linear(weights["fc.weight"])
        self.layer = DecoderLayer(weights, "midlayer.", s.heads, s.eps)
        self.hidden_norm, self.input_norm = weights["midlayer.hidden_norm.weight"], weights["midlayer.input_layernorm.weight"]
        self.norm = weights["norm.weight"]
        self.head = Linear(weights["lm_head.weight"])
        self.d2t = draft.d2t.to(self.device, copy=True)
        self.full_vocab = s.draft_vocab_size == s.vocab_size and not bool(self.d2t.any())
        self.cos, self.sin = draft.cos.to(self.device, self.dtype), draft.sin.to(self.device, self.dtype)

    def new_cache(self, slots: int, positions: int) -> KVCache:
        return new_cache(self._pass, 1, slots, positions, self.shape.heads, self.embedding_VD, STATIC_WIDTH)

    def empty_taps(self, N: int) -> Tensor:
        """Zeros [N, G * D] for `extend`."""
        return torch.zeros(N, self.shape.num_taps * self.shape.hidden_size, device=self.device, dtype=self.dtype)

    @torch.inference_mode()
    def extend(self, taps_NG: Tensor, next_ids_N: Tensor, positions_N: Tensor, widths: Sequence[int], cache: KVCache,
               first_slot: int = 0) -> Tensor:
        """Rows with true taps [N, G * D], and the tokens after them: widths[b] rows of slot first_slot + b. Returns states [N, D]."""
        return self._run(self.fc(taps_NG), next_ids_N, positions_N, widths, cache, first_slot)

    @torch.inference_mode()
    def step(self, state_BD: Tensor, ids_B: Tensor, positions_B: Tensor, cache: KVCache, first_slot: int = 0) -> Tensor:
        """One more drafted token per request, from the draft's own state: returns output states [B, D]."""
        return self._run(state_BD, ids_B, positions_B, [1] * len(ids_B), cache, first_slot)

    @torch.inference_mode()
    def logits(self, state_BD: Tensor) -> Tensor:
        """Over the draft's vocabulary: [B, D] -> [B, draft vocabulary]."""
        return self.head(F.rms_norm(state_BD, state_BD.shape[-1:], self.norm, self.shape.eps))

    def to_target(self, draft_ids: Tensor) -> Tensor:
        """Draft token ids -> target token ids."""
        return draft_ids if self.full_vocab else draft_ids + self.d2t[draft_ids]

    def _run(self, hidden_ND: Tensor, ids_N: Tensor, positions_N: Tensor, widths: Sequence[int], cache: KVCache, first_slot: int) -> Tensor:
        if cache.static is not None and cache.static.takes(widths, first_slot):
            return cache.static.run(cache, ids_N, positions_N, widths, hidden_ND)[0]
        rows = StepRows.build(positions_N, widths, first_slot, cache.positions)
        return self._pass(cache, rows.to(self.device), to_device(ids_N, self.device), hidden_ND)[0]


    def _pass(self, cache: KVCache, rows: StepRows, ids_N: Tensor, hidden_ND: Tensor) -> tuple[Tensor]:
        """All on the device; reads no value back."""
        at = StepGeometry.of(rows, self.shape.heads.groups, self.cos, self.sin)
        size, eps = hidden_ND.shape[-1:], self.shape.eps
        embedded = F.rms_norm(self.embedding_VD[ids_N], size, self.input_norm, eps)
        both = torch.cat((embedded, F.rms_norm(hidden_ND, size, self.hidden_norm, eps)), dim=-1)
        x = hidden_ND + self.layer.attend(both, cache, 0, at)
        x += self.layer.feed_forward(x)
        return (x,)
