"""Rows at which the serving draft was rejected weigh more: exactly those, and the mean weight stays 1."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.fakes_training import captured, made_up, open_target, random_draft, tiny_engine, to_lake
from tide_pipeline.capture.reader import WindowStates, list_windows, read_states
from tide_pipeline.capture.windows import ClosedWindow, RowShape, WindowAssembler
from tide_pipeline.config import TideConfig, override
from tide_pipeline.contracts import RequestOpened, SamplingParams, StepEvent, StepKind
from tide_pipeline.training.batches import NO_LABEL, Batch, Sampler, Slice, labelled_rows, pack, rejected_counts, rejected_rows
from tide_pipeline.training.gradient import GradientMaker, divisors
from tide_pipeline.training.loop import TrainingInterrupted, train_draft
from tide_pipeline.training.loss import LossWeights, ttt_loss
from tide_pipeline.training.snapshot import load_snapshot
from tide_pipeline.training.target_head import target_head_of
from tide_pipeline.training.team import Team


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TideConfig:
    return tiny_engine(tmp_path_factory.mktemp("rejected"))


def rejecting(states: WindowStates, *positions: int) -> WindowStates:
    return dataclasses.replace(states, rejected_R2=torch.tensor([[p, 1] for p in positions], dtype=torch.int32).reshape(-1, 2))


def test_the_rows_that_predict_a_rejected_position_weigh_more() -> None:
    """Rows 0..9 stand at positions 5..14; the row at t predicts x_{t+2}. 6 is predicted before the window, 16 has no label in it."""
    window = rejecting(made_up("a", 10, start_pos=5), 6, 7, 11, 15, 16)
    other = rejecting(made_up("b", 8), 4)
    batch = pack([[Slice(other, 0, 8), Slice(window, 0, 10)], [Slice(window, 3, 7), Slice(other, 3, 5)]], 20, reject_weight=1.5)
    assert batch.weights_BT is not None
    heavy = {(b, t) for b, t in (batch.weights_BT == 2.5).nonzero().tolist()}
    assert heavy == {(0, 2), (0, 8), (0, 12), (0, 16), (1, 1), (1, 5)} and set(batch.weights_BT.unique().tolist()) == {1.0, 2.5}
    for b, t in heavy:
        source = {"a": window, "b": other}[batch.windows[b][int(batch.segments_BT[b, t])].request_id]
        rejected_at = int(batch.positions_BT[b, t]) + 2
        assert rejected_at in source.rejected_R2[:, 0].tolist()
        assert batch.labels_BT[b, t] == source.token_ids[rejected_at - source.window.start_pos]
    assert rejected_rows(Slice(window, 3, 4)).tolist() == [1] and rejected_counts([[Slice(window, 0, 10)]], 5) == [3, 2, 2, 2, 2]
    assert pack([[Slice(window, 0, 10)]], 20).weights_BT is None


def test_what_the_engine_tells_reaches_the_row_that_was_wrong(config: TideConfig, tmp_path: Path) -> None:
    """A step at position 8 drafts 4 tokens, 1 is accepted: the second one, for x_10, was wrong, and row 8 should have known better."""
    closed: list[ClosedWindow] = []
    prompt = tuple(range(20, 28))
    opened = RequestOpened("r", "de", "t", prompt, SamplingParams(), "auto")
    assembler = WindowAssembler(opened, RowShape(32, 3, True, "digest"), closed.append, lambda: 1.0)
    assembler.add(StepEvent("r", StepKind.PREFILL, 0, prompt, (28,), (), 0, "v", 0, 1, 1.0, None), np.zeros((8, 128), np.int16))
    verify = StepEvent("r", StepKind.VERIFY, 8, (28, 29), (29, 30), (29, 50, 51, 52), 1, "v", 4, 1, 1.0, None)
    assembler.add(verify, np.zeros((2, 128), np.int16))
    assembler.close()
    (window,) = closed
    assert window.rejected == [(10, 50)] and window.token_ids[10] == 30
    states = rejecting(made_up("r", 10), *(p for p, _ in window.rejected))
    assert rejected_rows(Slice(states, 0, 10)).tolist() == [8]
    lake = override(config, {"state_dir": str(tmp_path)})
    told = [dataclasses.replace(s, rejected_R2=torch.tensor([[10, 50], [12, 3]], dtype=torch.int32)[:n])
            for n, s in enumerate(captured(open_target(config), "de", 3))]
    to_lake(lake, told)
    read = sorted(read_states(list_windows(lake.state.signals, lake.target).windows), key=lambda s: s.window.request_id)
    assert [s.rejected_R2.tolist() for s in read] == [[], [[10, 50]], [[10, 50], [12, 3]]]


def batch_with_rejections(config: TideConfig, reject_weight: float) -> Batch:
    first, second = captured(open_target(config), "py", 2, prompt=5, output=15)
    return pack([[Slice(rejecting(first, 6, 7, 12, 20), 0, 20)], [Slice(rejecting(second, 15), 4, 16)]], 22, reject_weight)


@pytest.mark.parametrize("accept_share", [0.0, 0.3])
def test_the_loss_is_the_weighted_mean(config: TideConfig, accept_share: float) -> None:
    target = open_target(config)
    draft, weight, depths = random_draft(target.shape), 2.0, 3
    heavy, plain = batch_with_rejections(config, weight), batch_with_rejections(config, 0.0)
    weights = LossWeights(depths, 0.5, 0.8, accept_share, weight)

    def loss(batch: Batch, num_rows: list[float] | None = None) -> float:
        return ttt_loss(draft, batch, target.embedding_VD, target.lm_head_VD, weights, num_rows).item()

    assert heavy.weights_BT is not None
    rejected = dataclasses.replace(plain, weights_BT=(heavy.weights_BT > 1).float())
    wanted = 0.0
    for j in range(depths):
        alone = [1.0 if i == j else math.inf for i in range(depths)]
        reached = (plain.labels_BT != NO_LABEL) & (plain.offsets_BT >= j)
        total = float(heavy.weights_BT[reached].sum())
        wanted += (loss(plain, alone) + weight * loss(rejected, alone)) / total
    assert loss(heavy) == pytest.approx(wanted, rel=1e-5) and loss(heavy) != pytest.approx(loss(plain), rel=1e-4)
    even = dataclasses.replace(plain, weights_BT=torch.ones_like(heavy.weights_BT))
    assert loss(even) == loss(plain), "weights of 1 are no weights, to the last bit"


def test_parts_of_a_batch_add_up_to_it(config: TideConfig) -> None:
    target, head = open_target(config), target_head_of(config)
    windows = [rejecting(w, *range(4 + i, 30, 5 + i)) for i, w in enumerate(captured(target, "de", 6))]
    rows = Sampler(windows, [], 4, 48, 0.0, 3).slices(0)
    weights, gradients = LossWeights(3, 0.5, 0.9, 0.0, 1.5), []
    for parts in (1, 4):
        draft = random_draft(target.shape)
        maker = GradientMaker(draft, head, weights, 48, False, parts)
        maker.run(rows, divisors(rows, rows, weights, Team()))
        gradients.append(torch.cat([p.grad.flatten() for p in maker.trained if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    batch = pack(rows, 48, 1.5)
    draft = random_draft(target.shape)
    whole = ttt_loss(draft, batch, head.embedding_VD, head.lm_head_VD, weights)
    whole.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in draft.parameters() if p.grad is not None]), gradients[0],
                               rtol=1e-4, atol=1e-5)
    assert divisors(rows, rows, LossWeights(3, 0.5, 0.9), Team()) == labelled_rows(rows, 3)


def test_processes_count_their_rejections_together(config: TideConfig) -> None:
    class Other(Team):
        def add_up(self, tensors: object) -> None:
            for t in tensors:  # type: ignore[attr-defined]
                t += 10

    window = rejecting(made_up("a", 10), 4, 9)
    rows = [[Slice(window, 0, 10)], [Slice(made_up("b", 10), 0, 10)]]
    assert divisors(rows, rows[:1], LossWeights(2, 0.5, 0.9, 0.0, 0.5), Other(0, 2)) == [18 + 0.5 * 12, 16 + 0.5 * 12]


def test_a_run_with_the_option_off_ignores_rejections_and_with_it_on_does_not(config: TideConfig, tmp_path: Path) -> None:
    settings = {"time_budget_s": 0.0, "max_steps": 6, "eval_every_steps": 6, "eval_share": 0.25, "window_rows": 48, "eval_windows": 2}
    windows, ends = captured(open_target(config), "de", 16), {}
    for name, told in (("silent", windows), ("telling", [rejecting(w, 9, 14, 22) for w in windows])):
        for weight in (0.0, 2.0):
            lake = override(config, {"state_dir": str(tmp_path / name), "training": settings | {"reject_weight": weight}})
            if weight == 0.0:
                to_lake(lake, told)
            with pytest.raises(TrainingInterrupted):
                train_draft(lake, workload="de", out_dir=tmp_path / f"{name}-{weight}", should_stop=iter([False] * 3 + [True]).__next__)
            snapshot = load_snapshot(tmp_path / f"{name}-{weight}")
            assert snapshot is not None
            ends[name, weight] = snapshot[1]["draft"]["fc.weight"]
    assert ends["silent", 0.0].equal(ends["telling", 0.0]) and ends["silent", 0.0].equal(ends["silent", 2.0])
    assert not ends["silent", 0.0].equal(ends["telling", 2.0])
