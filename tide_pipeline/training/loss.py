"""The training loss: what the target would emit, at every depth of the unrolled draft. Knows no optimizer.

    L = sum_j decay^j / N_j  sum_rows  (1 - a) [(1 - s) CE(label, p_j) + s KL(q || p_j)] + a [1 - sum_x min(p_j, m)]

q = softmax(lm_head · f_{t+1}) is the target's distribution for the token after row t+1, the label its argmax (what a
greedy target emits); where the engine stored no final states the label is the captured token and s = 0. With a reduced
draft vocabulary q is renormalised on it, and rows whose label lies outside count as zero.

CE and KL share their logits: with m = (1 - s) onehot(label) + s q their sum is logsumexp(z) - m · z - s H(q). The last
term is acceptance-direct: sum_x min(p, q) is the probability that speculative sampling accepts a token drawn from p, one minus
the total variation. Its gradient in the logits is p (A - I), where I = [p < m] and A = p · I.

N_j counts all labelled rows of the whole batch at depth j, so that parts of a batch (micro-batches, other processes) add up to it. Rows
at which the serving draft was rejected may count as 1 + reject_weight rows, in the sum and in N_j: the mean weight is 1.

B = batch rows, T = token rows, M = labelled rows, D = hidden size, V = target vocabulary, U = draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tide_pipeline.models.eagle3 import Eagle3Draft
from tide_pipeline.training.batches import NO_LABEL, Batch
from tide_pipeline.training.unroll import Unroll


@dataclass(frozen=True)
class LossWeights:
    """How the parts of the loss are weighed."""

    ttt_steps: int
    soft_share: float
    step_decay: float
    accept_share: float = 0.0
    reject_weight: float = 0.0


@dataclass(frozen=True)
class Targets:
    """What the labelled rows of a batch are trained toward; rows are flat indices into [B * T]."""

    rows_M: Tensor
    labels_M: Tensor               # draft ids
    mixture_MU: Tensor             # m: sums to 1
    entropy_M: Tensor              # s H(q): what the loss can't go below


def draft_ids(draft: Eagle3Draft) -> Tensor:
    """Target id of every draft id [U]."""
    return torch.arange(len(draft.d2t), device=draft.d2t.device) + draft.d2t


@torch.no_grad()
def make_targets(batch: Batch, draft: Eagle3Draft, lm_head_VD: Tensor, soft_share: float) -> Targets:
    """Labels and soft targets, once per batch."""
    U, full = draft.shape.draft_vocab_size, draft.shape.draft_vocab_size == draft.shape.vocab_size
    rows_M = (batch.labels_BT.flatten() != NO_LABEL).nonzero().squeeze(1)
    labels_M = batch.labels_BT.flatten()[rows_M]
    z_MV = None
    if batch.teacher_BTD is not None:
        z_MV = (batch.teacher_BTD.flatten(0, 1)[rows_M].float() @ lm_head_VD.T).float()
        labels_M = z_MV.argmax(-1)
    if not full:
        ids_U = draft_ids(draft)
        known = draft.t2d[labels_M]
        rows_M, labels_M = rows_M[known], torch.searchsorted(ids_U, labels_M[known])
        z_MV = None if z_MV is None else z_MV[known][:, ids_U]
    s = soft_share if z_MV is not None else 0.0
    if z_MV is None or s == 0.0:
        mixture_MU, entropy_M = torch.zeros(len(rows_M), U, device=rows_M.device), torch.zeros(len(rows_M), device=rows_M.device)
    else:
        q_MU = z_MV.softmax(-1)
        entropy_M = s * (torch.logsumexp(z_MV, -1) - (q_MU * z_MV).sum(-1))
        mixture_MU = q_MU.mul_(s)
    mixture_MU.scatter_add_(1, labels_M.unsqueeze(1), torch.full_like(mixture_MU[:, :1], 1 - s))
    return Targets(rows_M, labels_M, mixture_MU, entropy_M)


class MixtureLoss(torch.autograd.Function):
    """sum_rows w [(1 - a) (logsumexp(z) - m · z) + a (1 - sum min(p, m))], with its gradient made on the way forward."""

    @staticmethod
    def forward(ctx: Any, z_MU: Tensor, mixture_MU: Tensor, weight_M: Tensor, accept_share: float) -> Tensor:
        z_MU = z_MU.float() if z_MU.dtype != torch.float32 else z_MU.clone()
        lse_M1 = torch.logsumexp(z_MU, -1, keepdim=True)
        loss_M = (1 - accept_share) * (lse_M1.squeeze(1) - torch.linalg.vecdot(mixture_MU, z_MU))
        p_MU = z_MU.sub_(lse_M1).exp_()
        direct_MU = None
        if accept_share > 0:
            loss_M += accept_share * (1 - torch.minimum(p_MU, mixture_MU).sum(-1))
            short_MU = p_MU * (p_MU < mixture_MU)
            direct_MU = accept_share * (p_MU * short_MU.sum(-1, keepdim=True) - short_MU)
        gradient_MU = p_MU.sub_(mixture_MU).mul_(1 - accept_share)
        if direct_MU is not None:
            gradient_MU += direct_MU
        ctx.save_for_backward(gradient_MU.mul_(weight_M.unsqueeze(1)))
        total: Tensor = (weight_M * loss_M).sum()
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        (gradient_MU,) = ctx.saved_tensors
        return gradient_MU * grads[0], None, None, None


def ttt_loss(draft: Eagle3Draft, batch: Batch, embedding_VD: Tensor, lm_head_VD: Tensor, weights: LossWeights,
             num_rows: Sequence[float] | None = None) -> Tensor:
    """The loss of one batch, a scalar that can be differentiated. Zero when no row of the batch has a label.

    `num_rows` is N_j where `batch` is only a part of what an update sees (`batches.labelled_rows`, `rejected_counts`); by default its own
    rows count.
    """
    targets = make_targets(batch, draft, lm_head_VD, weights.soft_share)
    offsets_M = batch.offsets_BT.flatten()[targets.rows_M]
    row_weights_M = None if batch.weights_BT is None else batch.weights_BT.flatten()[targets.rows_M]
    if num_rows is None:
        has_label = batch.labels_BT != NO_LABEL
        reached = [has_label & (batch.offsets_BT >= j) for j in range(weights.ttt_steps)]
        num_rows = [float(rows.sum() if batch.weights_BT is None else batch.weights_BT[rows].sum()) for rows in reached]
    unroll = Unroll(draft, embedding_VD, batch.taps_BTG, batch.positions_BT, batch.segments_BT)
    total = torch.zeros((), device=offsets_M.device)
    for j in range(weights.ttt_steps):
        states_MD = unroll.step(batch.next_ids_BT).flatten(0, 1)[targets.rows_M]
        weight_M = (offsets_M >= j) * (weights.step_decay**j / max(num_rows[j], 1))      # row t of step j needs an anchor, row t-j
        if row_weights_M is not None:
            weight_M = weight_M * row_weights_M
        logits_MU = draft.lm_head(draft.norm(states_MD))
        total = total + MixtureLoss.apply(logits_MU, targets.mixture_MU, weight_M, weights.accept_share)  # type: ignore[no-untyped-call]
        total = total - (1 - weights.accept_share) * (weight_M * targets.entropy_M).sum()
    return total
