"""How much GPU memory serving a target with its draft takes, and training the draft: from numbers alone. Knows no files and no torch.

Weights, draft and cache are exact: tests compare them with published checkpoints, byte by byte. Activations and OVERHEAD are estimates
on the high side; nothing here was measured on a GPU. Sizes are bytes of one GPU unless a name says otherwise.

D = hidden size, E = head size, I = intermediate size, V = vocabulary, U = the draft's, K = draft length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tide_pipeline.config import ServeSettings, TrainingSettings
from tide_pipeline.engine.gpus import Gpu
from tide_pipeline.engine_spec import Architecture, EngineSpec, StartingDraft

BF16, FP32 = 2, 4
OVERHEAD = 3 * 10**9               # CUDA context, NCCL, workspaces, captured graphs
TRAIN_OVERHEAD = 15 * 10**8
RING_SLOTS = 4                     # steps in the capture ring on the device
TYPICAL_CONTEXT = 2_048            # tokens a running request is given room for, at least
TRAINED_BYTES = 8                  # a trained parameter in fp32, in every process: weight, gradient
ADAM_BYTES, MUON_BYTES = 8, 4      # with its owner: two moments (one)


@dataclass(frozen=True)
class ServingMemory:
    """One serving GPU's share."""

    gpu: Gpu
    gpus: int
    weights: int
    draft: int
    tap_buffers: int               # tapped states of a step: TensorRT-LLM keeps one buffer per captured graph
    ring: int
    activations: int
    kv_token: int                  # cache of one token, target and draft
    kv_tokens: int                 # tokens the cache holds; 0 when nothing is left for it
    needed_tokens: int

    @property
    def fixed(self) -> int:
        """All but the cache."""
        return self.weights + self.draft + self.tap_buffers + self.ring + self.activations + OVERHEAD

    @property
    def fits(self) -> bool:
        return self.kv_tokens >= self.needed_tokens


@dataclass(frozen=True)
class TrainingMemory:
    """One training GPU's share: of a team's, the one that keeps most."""

    gpu: Gpu
    trained: int                   # parameters with gradient, the frozen lm_head of the draft
    kept: int                      # optimizer state, and the average of the weights, of the tensors that it owns
    frozen: int                    # embeddings and lm_heads
    activations: int               # of one row of window_rows tokens: the least that a micro-batch can be

    @property
    def total(self) -> int:
        return self.trained + self.kept + self.frozen + self.activations + TRAIN_OVERHEAD

    @property
    def fits(self) -> bool:
        return self.total <= self.gpu.memory


def weight_bytes(a: Architecture) -> int:
    """The target's checkpoint, tensors alone."""
    D, q, kv = a.hidden_size, a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    layer = (q + 2 * kv) * D + D * q + 2 * D + (2 * a.head_dim if a.qk_norm else 0)
    layer += q + 2 * kv + D + a.num_attention_heads if a.biased else 0
    mlp, expert_biases = 3 * D * a.intermediate_size, 2 * a.intermediate_size + D
    if a.num_experts:
        layer += a.num_experts * (D + (1 + expert_biases if a.biased else 0))                 # router, biases
    experts = a.num_experts * mlp * a.expert_bits if a.num_experts else mlp * a.weight_bits
    outside = a.vocab_size * D * (1 if a.tie_word_embeddings else 2) + D
    return math.ceil((a.num_hidden_layers * (layer * a.weight_bits + experts) + outside * a.weight_bits) / 8)


def draft_sizes(a: Architecture, draft: StartingDraft) -> StartingDraft:
    """`draft` with its zeros filled in."""
    return replace(draft, intermediate_size=draft.intermediate_size or a.intermediate_size, vocab_size=draft.vocab_size or a.vocab_size)


def draft_tensors(a: Architecture, draft: StartingDraft, num_taps: int = 3) -> list[int]:
    """Parameters of each tensor: fc, one decoder layer and the norms; no lm_head."""
    D, q, kv = a.hidden_size, a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    return [num_taps * D * D, *(rows * 2 * D for rows in (q, kv, kv)), D * q, *3 * [D * draft_sizes(a, draft).intermediate_size], *4 * [D]]


def draft_parameters(a: Architecture, draft: StartingDraft, num_taps: int = 3) -> int:
    """Of all of them together."""
    return sum(draft_tensors(a, draft, num_taps))


def draft_bytes(a: Architecture, draft: StartingDraft, num_taps: int = 3) -> int:
    """The draft's file without its header: bf16, and with an lm_head of its own d2t (int64) and t2d (bool) too."""
    U = draft_sizes(a, draft).vocab_size
    return BF16 * draft_parameters(a, draft, num_taps) + (BF16 * U * a.hidden_size + 8 * U + a.vocab_size if draft.has_lm_head else 0)


def kv_bytes_per_token(a: Architecture, gpus: int = 1, value_bytes: int = BF16) -> int:
    """Keys and values of one token in every layer, and in the draft's own. A head is not split: beyond their number it is repeated."""
    return 2 * math.ceil(a.num_key_value_heads / gpus) * a.head_dim * value_bytes * (a.num_hidden_layers + 1)


def deal(sizes: Sequence[int], processes: int) -> list[int]:
    """Who of a training team keeps the optimizer state of each tensor: the largest first, to whoever has least so far."""
    held, owners = [0] * processes, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = held.index(min(held))
        held[owners[i]] += sizes[i]
    return owners


def tap_row_bytes(a: Architecture, num_taps: int = 3) -> int:
    """Tapped states of one token."""
    return num_taps * a.hidden_size * BF16


def step_tokens(serve: ServeSettings, draft_length: int) -> int:
    """Tokens of the largest step: TensorRT-LLM's max_num_tokens."""
    return max(serve.prefill_chunk, serve.max_batch * (1 + draft_length))


def graph_batches(max_batch: int) -> tuple[int, ...]:
    """Batch sizes with a captured graph: powers of two and the largest. Few, as each has a buffer of tapped states."""
    return (*(1 << i for i in range(max(max_batch - 1, 1).bit_length()) if 1 << i < max_batch), max_batch)


def serving_memory(spec: EngineSpec, serve: ServeSettings, gpu: Gpu, draft_length: int | None = None) -> ServingMemory:
    """One GPU's share when `serve.gpus` of this class serve the target together."""
    a, gpus, taps = spec.architecture, serve.gpus, len(spec.capture_layers)
    tokens = step_tokens(serve, spec.max_draft_length if draft_length is None else draft_length)
    width = 3 * a.intermediate_size * max(1, a.experts_per_token) / gpus
    logits = serve.max_batch * (1 + spec.max_draft_length) * a.vocab_size * FP32 * 2
    parts = ServingMemory(
        gpu, gpus, weights=math.ceil(weight_bytes(a) / gpus), draft=draft_bytes(a, spec.draft, taps),
        tap_buffers=(1 + len(graph_batches(serve.max_batch))) * tokens * tap_row_bytes(a, taps),
        ring=RING_SLOTS * tokens * tap_row_bytes(a, taps), activations=math.ceil(tokens * (6 * a.hidden_size + width) * BF16) + logits,
        kv_token=kv_bytes_per_token(a, gpus, 1 if spec.trtllm.kv_dtype == "fp8" else BF16), kv_tokens=0,
        needed_tokens=max(spec.max_context, serve.max_batch * min(TYPICAL_CONTEXT, spec.max_context)))
    free = (gpu.memory - parts.fixed) * spec.trtllm.kv_fraction
    return replace(parts, kv_tokens=max(0, int(free // parts.kv_token)))


def training_memory(spec: EngineSpec, settings: TrainingSettings, gpu: Gpu) -> TrainingMemory:
    """One GPU's share, with one process on each of `train_devices`. All is in fp32, as in training/run.py; activations are of one row of
    a batch, unrolled `ttt_steps` times. The best weights so far are in host memory.
    """
    a, draft, D = spec.architecture, draft_sizes(spec.architecture, spec.draft), spec.architecture.hidden_size
    U, rows, processes = settings.draft_vocab_size or draft.vocab_size, settings.window_rows, max(len(settings.train_devices), 1)
    head = U * D
    sizes = draft_tensors(a, draft, len(spec.capture_layers)) + [head] * settings.train_lm_head
    owned = [0] * processes
    for size, owner in zip(sizes, deal(sizes, processes), strict=True):
        owned[owner] += size
    kept = (MUON_BYTES if settings.optimizer == "muon" else ADAM_BYTES) + (FP32 if settings.ema_decay > 0 else 0)
    token = (6 * D + 3 * draft.intermediate_size + 4 * a.num_attention_heads * a.head_dim + 2 * U) * FP32
    scores = a.num_attention_heads * rows * FP32
    return TrainingMemory(gpu, TRAINED_BYTES * sum(sizes) + (0 if settings.train_lm_head else FP32 * head), kept * max(owned),
                          2 * a.vocab_size * D * FP32, settings.ttt_steps * rows * (token + scores))
