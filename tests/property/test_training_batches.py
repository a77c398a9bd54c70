"""Whatever is packed, every row keeps its neighbours; whatever is walked, every token is counted once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes_training import batch_of, made_up
from tide_pipeline.training.acceptance import walk
from tide_pipeline.training.batches import NO_LABEL, Sampler, labelled_rows


@given(st.lists(st.integers(8, 70), min_size=1, max_size=6), st.integers(1, 3), st.integers(16, 64), st.floats(0, 1), st.integers(0, 9))
def test_packed_rows_are_the_windows_rows(lengths: list[int], batch_rows: int, width: int, share: float, step: int) -> None:
    windows = [made_up(f"r{i}", rows, start_pos=i * 5) for i, rows in enumerate(lengths)]
    by_id = {w.window.request_id: w for w in windows}
    sampler = Sampler(windows, windows[:1], batch_rows, width, share, seed=1)
    batch = batch_of(sampler, step)
    offsets = batch.offsets_BT[batch.labels_BT != NO_LABEL]
    assert labelled_rows(sampler.slices(step), 3) == [int((offsets >= j).sum()) for j in range(3)]
    assert batch.next_ids_BT.shape == (batch_rows, width) and batch.num_rows > 0
    for b, t in (batch.segments_BT >= 0).nonzero().tolist():
        w = by_id[batch.windows[b][int(batch.segments_BT[b, t])].request_id]
        row = int(batch.positions_BT[b, t]) - w.window.start_pos
        assert batch.taps_BTG[b, t].equal(w.taps_TG[row]) and batch.next_ids_BT[b, t] == w.token_ids[row + 1]
        last = row == len(w.taps_TG) - 1
        assert batch.labels_BT[b, t] == (NO_LABEL if last else w.token_ids[row + 2])
        assert w.final_TD is not None and batch.teacher_BTD is not None
        assert last or batch.teacher_BTD[b, t].equal(w.final_TD[row + 1])
        assert batch.offsets_BT[b, t] == 0 or batch.positions_BT[b, t] == batch.positions_BT[b, t - 1] + 1
    assert (batch.labels_BT[batch.segments_BT < 0] == NO_LABEL).all()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.booleans(), st.data())
def test_a_walk_counts_every_token_once(accepted: list[int], has_stopped: bool, data: st.DataObject) -> None:
    """Chances of 0 and 1: the walk is one path. `accepted[t]`: drafts after row t that would be accepted, if there is room for them."""
    first, last = data.draw(st.integers(0, len(accepted) - 1)), len(accepted) - 1
    steps, by_position = walk([[float(i < n) for i in range(4)] for n in accepted], first, last, has_stopped)
    taken, at = [], first
    while (room := min(4, last - at if has_stopped else last - at - 1)) > 0:
        taken.append(min(accepted[at], room))
        at += taken[-1] + 1
    assert steps == len(taken) and sum(by_position) == sum(taken)
    assert list(by_position) == sorted(by_position, reverse=True)                # position i needs position i - 1


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=12), st.booleans())
def test_a_walk_over_chances_is_the_mean_of_all_paths(chances: list[list[float]], has_stopped: bool) -> None:
    """Against the expectation written down backwards: what is to come after an anchor."""
    last = len(chances) - 1

    def from_here(anchor: int) -> tuple[float, float]:
        room = min(3, last - anchor if has_stopped else last - anchor - 1)
        if room < 1:
            return 0.0, 0.0
        steps, kept, alive = 1.0, 0.0, 1.0
        for n in range(room + 1):
            ends = alive * (1.0 - chances[anchor][n]) if n < room else alive     # exactly n are accepted
            more_steps, more_kept = from_here(anchor + n + 1)
            steps, kept = steps + ends * more_steps, kept + ends * (n + more_kept)
            alive -= ends
        return steps, kept

    steps, by_position = walk(chances, 0, last, has_stopped)
    assert (steps, sum(by_position)) == pytest.approx(from_here(0))
