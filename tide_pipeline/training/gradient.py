"""The gradient of one effective batch, in as many micro-batches as fit into memory. Knows no optimizer and no schedule.

A micro-batch holds whole rows of the batch and its loss is divided by the rows of the whole batch, so the sum over micro-batches,
and over the processes of a team, is the gradient of the batch. When memory runs out, the micro-batch is halved and the same
batch is computed again; the smaller one is kept for the rest of the run.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tide_pipeline.capture.reader import WindowStates
from tide_pipeline.errors import TrainingFailed
from tide_pipeline.models.eagle3 import Eagle3Draft
from tide_pipeline.training.batches import S, Slice, labelled_rows, pack, rejected_counts
from tide_pipeline.training.loss import LossWeights, ttt_loss
from tide_pipeline.training.target_head import TargetHead
from tide_pipeline.training.team import Team

Rows = Sequence[Sequence[Slice[WindowStates]]]
_log = logging.getLogger(__name__)


@dataclasses.dataclass
class GradientMaker:
    """Fills `grad` of the draft's trained parameters."""

    draft: Eagle3Draft
    head: TargetHead
    weights: LossWeights
    width: int                     # token rows of a batch row
    autocast: bool
    parts: int                     # micro-batches

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.draft.parameters() if p.requires_grad]

    def run(self, rows: Rows, num_rows: Sequence[float]) -> Tensor:
        """Add the gradient of `rows`, whose loss is divided by `num_rows`; returns the loss (no gradient).

        Raises:
            TrainingFailed: a single row does not fit into memory.
        """
        while True:
            try:
                return self._accumulate(rows, num_rows)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                if self.parts >= len(rows):
                    raise TrainingFailed(f"one row of {self.width} tokens does not fit into memory ({_first_line(error)}): lower "
                                         "training.window_rows or training.ttt_steps, or train on a larger device") from error
            self.clear()                                                   # outside `except`: the traceback holds tensors
            self.parts = min(2 * self.parts, len(rows))
            _log.warning("out of memory: the same batch goes on in %d micro-batches (training.accumulate)", self.parts)

    def clear(self) -> None:
        """Drop the gradients, and what the device caches."""
        for p in self.trained:
            p.grad = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def alone(self, cut: Slice[WindowStates]) -> float:
        """The loss of one slice by itself; NaN where its gradient is not finite. Clears gradients."""
        self.clear()
        loss = float(self._accumulate([[cut]], divisors([[cut]], [[cut]], self.weights, Team())))
        finite = all(bool(torch.isfinite(p.grad).all()) for p in self.trained if p.grad is not None)
        self.clear()
        return loss if finite else math.nan

    def _accumulate(self, rows: Rows, num_rows: Sequence[float]) -> Tensor:
        device = self.head.embedding_VD.device
        total, size = torch.zeros((), device=device), math.ceil(len(rows) / self.parts)
        for first in range(0, len(rows), size):
            batch = pack(rows[first : first + size], self.width, self.weights.reject_weight).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
                loss = ttt_loss(self.draft, batch, self.head.embedding_VD, self.head.lm_head_VD, self.weights, num_rows)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total


def divisors(drawn: Sequence[Sequence[Slice[S]]], mine: Rows, weights: LossWeights, team: Team) -> Sequence[float]:
    """What the loss of a whole batch is divided by at each depth: its labelled rows, rejected ones as 1 + reject_weight of them."""
    labelled = labelled_rows(drawn, weights.ttt_steps)
    if weights.reject_weight == 0:
        return labelled
    rejected = torch.tensor(rejected_counts(mine, weights.ttt_steps), dtype=torch.float64, device=team.device)
    team.add_up([rejected])
    return [n + weights.reject_weight * r for n, r in zip(labelled, rejected.tolist(), strict=True)]


def blame(maker: GradientMaker, rows: Rows) -> list[tuple[float, str]]:
    """Each window of `rows` with its loss alone; where states are not finite, those windows only. Names ids and places, no content."""
    cuts = [cut for row in rows for cut in row]
    broken = [cut for cut in cuts if not _finite(cut)]
    return [(maker.alone(cut), _name(cut) + (", whose states are not finite" if broken else "")) for cut in broken or cuts]


def _finite(cut: Slice[WindowStates]) -> bool:
    """Its rows' taps, and the teacher states behind them."""
    rows = slice(cut.start, cut.start + cut.rows + 1)
    return all(bool(torch.isfinite(t[rows]).all()) for t in (cut.source.taps_TG[:rows.stop - 1], cut.source.final_TD) if t is not None)


def _name(cut: Slice[WindowStates]) -> str:
    w = cut.source.window
    return f"request {w.request_id}, window at position {w.start_pos} ({Path(w.uri).name} row {w.row})"


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)      # the latter on a CPU


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
