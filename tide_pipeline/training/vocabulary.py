"""The draft's vocabulary: rebuilt from the traffic it will meet, weights carried over by target token. Knows no files.

A draft that lacks the new workload's tokens can never propose them; so a reduced vocabulary is chosen again in every cycle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tide_pipeline.models.checkpoint import shape_for
from tide_pipeline.models.eagle3 import Eagle3Draft
from tide_pipeline.training.loss import draft_ids
from tide_pipeline.training.target_head import TargetHead


def frequent_tokens(counts_V: Tensor, keep: int, known_V: Tensor | None = None) -> Tensor:
    """The `keep` most frequent token ids, sorted; ties and unseen tokens by lower id.

    A token that the champion knows (`known` [V], bool) counts once more: what it was trained on is rarely all in the lake, and of the
    tokens that the lake does not show, its own are those that old workloads will ask for.
    """
    counts_V = counts_V if known_V is None else counts_V + known_V.to(counts_V)
    return counts_V.argsort(descending=True, stable=True)[:keep].sort().values


def new_draft(head: TargetHead, target_ids: Tensor | None) -> Eagle3Draft:
    """A fresh draft: random layer, the target's own lm_head. `target_ids` None is the full vocabulary."""
    draft = Eagle3Draft(shape_for(head.shape, len(head.spec.capture_layers), None if target_ids is None else len(target_ids)))
    if target_ids is not None:
        draft.set_vocabulary(target_ids)
    with torch.no_grad():
        draft.lm_head.weight.copy_(head.lm_head_VD if target_ids is None else head.lm_head_VD[target_ids])
    return draft


def with_vocabulary(draft: Eagle3Draft, head: TargetHead, target_ids: Tensor | None) -> Eagle3Draft:
    """The same draft for another vocabulary: output rows it has are kept, missing ones come from the target's lm_head."""
    old_ids = draft_ids(draft)
    wanted = torch.arange(head.shape.vocab_size) if target_ids is None else target_ids
    if torch.equal(old_ids, wanted):
        return draft
    lm_head_VD = head.lm_head_VD.clone()
    lm_head_VD[old_ids] = draft.lm_head.weight.detach()
    moved = new_draft(head, target_ids)
    kept = {name: tensor for name, tensor in draft.state_dict().items() if name not in ("lm_head.weight", "d2t", "t2d")}
    moved.load_state_dict(kept, strict=False)
    with torch.no_grad():
        moved.lm_head.weight.copy_(lm_head_VD[wanted])
    return moved
