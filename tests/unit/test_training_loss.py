"""The fused loss against the formula, written out slowly; reduced vocabularies; missing final states."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fakes_training import captured, open_target, random_draft, tiny_engine
from tide_pipeline.models.eagle3 import Eagle3Draft
from tide_pipeline.models.target import Target
from tide_pipeline.training.batches import NO_LABEL, Batch, Slice, pack
from tide_pipeline.training.loss import LossWeights, draft_ids, make_targets, ttt_loss
from tide_pipeline.training.unroll import Unroll


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return open_target(tiny_engine(tmp_path_factory.mktemp("loss")))


def a_batch(target: Target, with_final: bool = True) -> Batch:
    first, second = captured(target, "py", 2, prompt=5, output=9, with_final=with_final)
    return pack([[Slice(first, 0, 10), Slice(second, 4, 10)], [Slice(second, 0, 14)]], 22)


def slow_loss(draft: Eagle3Draft, batch: Batch, target: Target, w: LossWeights) -> Tensor:
    """Row by row, straight from the docstring."""
    ids = draft_ids(draft)
    unroll = Unroll(draft, target.embedding_VD, batch.taps_BTG, batch.positions_BT, batch.segments_BT)
    total = torch.zeros(())
    for j in range(w.ttt_steps):
        logp_BTU = draft.lm_head(draft.norm(unroll.step(batch.next_ids_BT))).log_softmax(-1)
        rows, labelled = [], (batch.labels_BT != NO_LABEL).nonzero().tolist()
        for b, t in labelled:
            label, s = int(batch.labels_BT[b, t]), 0.0
            if batch.teacher_BTD is not None:
                teacher_V = target.lm_head_VD @ batch.teacher_BTD[b, t].float()
                label, s = int(teacher_V.argmax()), w.soft_share
                q_U = teacher_V[ids].softmax(-1)
            if label not in ids.tolist() or batch.offsets_BT[b, t] < j:
                continue
            row = -(1 - s) * logp_BTU[b, t, ids.tolist().index(label)]
            row = row + s * F.kl_div(logp_BTU[b, t], q_U, reduction="sum") if s else row
            wanted_U = (1 - s) * F.one_hot(torch.tensor(ids.tolist().index(label)), len(ids)) + (s * q_U if s else 0.0)
            direct = 1 - torch.minimum(logp_BTU[b, t].exp(), wanted_U).sum()
            rows.append((1 - w.accept_share) * row + w.accept_share * direct)
        total = total + w.step_decay**j * torch.stack(rows).sum() / sum(int(batch.offsets_BT[b, t]) >= j for b, t in labelled)
    return total


@pytest.mark.parametrize("soft_share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("vocabulary", [None, 40])
@pytest.mark.parametrize("with_final", [True, False])
@pytest.mark.parametrize("accept_share", [0.0, 0.4, 1.0])
def test_loss_and_gradient_are_those_of_the_formula(target: Target, soft_share: float, vocabulary: int | None, with_final: bool,
                                                    accept_share: float) -> None:
    ids = None if vocabulary is None else torch.randperm(64, generator=torch.Generator().manual_seed(1))[:vocabulary].sort().values
    draft, weights = random_draft(target.shape, vocabulary=ids), LossWeights(3, soft_share, 0.8, accept_share)
    batch = a_batch(target, with_final)
    losses, gradients = [], []
    for loss in (ttt_loss(draft, batch, target.embedding_VD, target.lm_head_VD, weights), slow_loss(draft, batch, target, weights)):
        draft.zero_grad()
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in draft.parameters() if p.grad is not None])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for fused, slow in zip(*gradients, strict=True):
        torch.testing.assert_close(fused, slow, atol=1e-4, rtol=1e-3)


def test_a_greedy_target_labels_with_what_it_emitted(target: Target) -> None:
    """The alignment golden: argmax(lm_head · f_{t+1}) is x_{t+2} on every generated row."""
    batch = a_batch(target)
    draft = random_draft(target.shape)
    targets = make_targets(batch, draft, target.lm_head_VD, 0.0)
    emitted = batch.labels_BT.flatten()[targets.rows_M]
    generated = batch.positions_BT.flatten()[targets.rows_M] >= 5 - 2            # x_{t+2} is past the prompt
    assert generated.sum() > 20
    assert (targets.labels_M == emitted)[generated].all()


def test_the_last_row_of_a_window_and_padding_have_no_label(target: Target) -> None:
    batch = a_batch(target)
    assert batch.labels_BT[0, 19] == NO_LABEL and (batch.labels_BT[0, 20:] == NO_LABEL).all() and batch.labels_BT[1, 13] == NO_LABEL
    assert batch.labels_BT[0, 9] != NO_LABEL                                     # a slice's last row knows the rows behind it
    assert batch.num_rows == 34


def test_no_label_at_all_is_a_loss_of_zero(target: Target) -> None:
    batch = a_batch(target)
    empty = dataclasses.replace(batch, labels_BT=torch.full_like(batch.labels_BT, NO_LABEL))
    loss = ttt_loss(random_draft(target.shape), empty, target.embedding_VD, target.lm_head_VD, LossWeights(2, 0.5, 0.9))
    assert loss.item() == 0.0
