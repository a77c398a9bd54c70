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

from tide_pipeline.errors import TrainingFailed
from tide_pipeline.models.eagle3 import Eagle3Draft
from tide_pipeline.training.batches import Slice, labelled_rows, pack
from tide_pipeline.training.loss import LossWeights, ttt_loss
from tide_pipeline.training.target_head import TargetHead

Rows = Sequence[Sequence[Slice]]
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

    def run(self, rows: Rows, num_rows: Sequence[int]) -> Tensor:
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

    def alone(self, cut: Slice) -> float:
        """The loss of one slice by itself; NaN where its gradient is not finite. Clears gradients."""
        self.clear()
        loss = float(self._accumulate([[cut]], labelled_rows([[cut]], self.weights.ttt_steps)))
        finite = all(bool(torch.isfinite(p.grad).all()) for p in self.trained if p.grad is not None)
        self.clear()
        return loss if finite else math.nan

    def _accumulate(self, rows: Rows, num_rows: Sequence[int]) -> Tensor:
        device = self.head.embedding_VD.device
        total, size = torch.zeros((), device=device), math.ceil(len(rows) / self.parts)
        for first in range(0, len(rows), size):
            batch = pack(rows[first : first + size], self.width).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
                loss = ttt_loss(self.draft, batch, self.head.embedding_VD, self.head.lm_head_VD, self.weights, num_rows)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total


def blame(maker: GradientMaker, rows: Rows) -> list[tuple[float, str]]:
    """Each window of `rows` with its loss alone; where states are not finite, those windows only. Names ids and places, no content."""
    cuts = [cut for row in rows for cut in row]
    broken = [cut for cut in cuts if not _finite(cut)]
    return [(maker.alone(cut), _name(cut) + (", whose states are not finite" if broken else "")) for cut in broken or cuts]


def _finite(cut: Slice) -> bool:
    """Its rows' taps, and the teacher states behind them."""
    rows = slice(cut.start, cut.start + cut.rows + 1)
    return all(bool(torch.isfinite(t[rows]).all()) for t in (cut.states.taps_TG[:rows.stop - 1], cut.states.final_TD) if t is not None)


def _name(cut: Slice) -> str:
    w = cut.states.window
    return f"request {w.request_id}, window at position {w.start_pos} ({Path(w.uri).name} row {w.row})"


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)      # the latter on a CPU


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
