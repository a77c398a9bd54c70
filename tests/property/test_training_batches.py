"""Whatever is packed, every row keeps its neighbours; whatever is walked, every token is counted once."""

from __future__ import annotations

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


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.data())
def test_a_walk_counts_every_token_once(accepted: list[int], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(accepted) - 1))
    steps, by_position = walk(accepted, first, len(accepted) - 1, 4)
    anchors, at = [], first
    while at < len(accepted):
        anchors.append(at)
        at += accepted[at] + 1
    assert steps == len(anchors) and sum(by_position) == sum(accepted[a] for a in anchors)
    assert list(by_position) == sorted(by_position, reverse=True)                # position i needs position i - 1
    assert first + steps + sum(by_position) == at


