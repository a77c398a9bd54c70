"""The unrolled draft must compute what the inference runner computes, anchor by anchor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.fakes_training import captured, open_target, random_draft, tiny_engine
from tide_pipeline.models.eagle3 import DraftRunner
from tide_pipeline.training.batches import Slice, pack
from tide_pipeline.training.unroll import Unroll


@pytest.mark.parametrize("depth", [0, 1, 2, 4])
def test_every_row_of_every_depth_equals_the_runner(tmp_path: Path, depth: int) -> None:
    target = open_target(tiny_engine(tmp_path))
    first, second = captured(target, "py", 2, prompt=6, output=10)
    draft = random_draft(target.shape)
    batch = pack([[Slice(first, 0, 12), Slice(second, 3, 11)]], 26)                  # two segments and padding
    unroll = Unroll(draft, target.embedding_VD, batch.taps_BTG, batch.positions_BT, batch.segments_BT)
    with torch.no_grad():
        for _ in range(depth + 1):
            states = unroll.step(batch.next_ids_BT)
        logits = draft.lm_head(draft.norm(states))[0]

    runner = DraftRunner(draft, target.embedding_VD)
    for cut, packed_at in ((Slice(first, 0, 12), 0), (Slice(second, 3, 11), 12)):
        for anchor in range(cut.rows - depth):
            cache = runner.new_cache(1, 64)
            rows = slice(cut.start, cut.start + anchor + 1)
            ids = cut.source.token_ids[cut.start + 1 :]
            # positions in the runner's cache count from the slice's first row; rotary attention is relative
            taps, positions = cut.source.taps_TG[rows].float(), torch.arange(anchor + 1)
            got = runner.extend(taps, ids[: anchor + 1], positions, [anchor + 1], cache)[-1:]
            for j in range(1, depth + 1):
                got = runner.step(got, ids[anchor + j][None], torch.tensor([anchor + j]), cache)
            torch.testing.assert_close(logits[packed_at + anchor + depth], runner.logits(got)[0], atol=1e-4, rtol=1e-4)


def test_rows_before_the_first_that_is_read_can_be_left_out(tmp_path: Path) -> None:
    """Prompts: their true keys are looked at, their own chains are nobody's."""
    target = open_target(tiny_engine(tmp_path))
    draft = random_draft(target.shape)
    batch = pack([[Slice(w, 0, 24)] for w in captured(target, "py", 2, prompt=12, output=12)], 24)
    whole, later = (Unroll(draft, target.embedding_VD, batch.taps_BTG, batch.positions_BT, batch.segments_BT) for _ in range(2))
    with torch.no_grad():
        whole.step(batch.next_ids_BT)
        later.step(batch.next_ids_BT)
        later.only_from(11)
        for depth in range(1, 5):
            expected, got = whole.step(batch.next_ids_BT), later.step(batch.next_ids_BT[:, 11:])
            torch.testing.assert_close(got[:, depth:], expected[:, 11 + depth :], atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_parameter(tmp_path: Path) -> None:
    target = open_target(tiny_engine(tmp_path))
    draft = random_draft(target.shape)
    (window,) = captured(target, "py", 1)
    batch = pack([[Slice(window, 0, 32)]], 32)
    unroll = Unroll(draft, target.embedding_VD, batch.taps_BTG, batch.positions_BT, batch.segments_BT)
    for _ in range(3):
        unroll.step(batch.next_ids_BT)
    draft.lm_head(draft.norm(unroll.states_BTD)).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in draft.parameters())
