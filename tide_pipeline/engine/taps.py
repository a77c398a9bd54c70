"""The ring of tapped states that a step leaves behind. Fixed memory; knows neither requests nor files."""

from __future__ import annotations

import torch
from torch import Tensor

from tide_pipeline.contracts import TapHandle


class TapRing:
    """`slots` buffers of `rows` state rows, bf16. A row is [taps of the captured layers | final post-norm state].

    On a CPU a row is written by the step itself, so a handle is good until the next `slots` steps have run;
    sinks copy what they keep before `on_step` returns.
    """

    def __init__(self, slots: int, rows: int, hidden_size: int, num_taps: int, with_final: bool) -> None:
        self.hidden_size, self.num_taps, self.with_final = hidden_size, num_taps, with_final
        self.width = hidden_size * (num_taps + int(with_final))
        self._rows_SRW = torch.zeros(slots, rows, self.width, dtype=torch.bfloat16)
        self._slot = -1
        self._fill = 0

    def next_slot(self) -> None:
        """Begin a step."""
        self._slot = (self._slot + 1) % self._rows_SRW.shape[0]
        self._fill = 0

    def put(self, taps_NG: Tensor, final_ND: Tensor | None) -> TapHandle:
        """Append rows of the current step: taps [N, num_taps * D] and final states [N, D], any float type."""
        n = taps_NG.shape[0]
        start, stop = self._fill, self._fill + n
        assert stop <= self._rows_SRW.shape[1], "more rows in a step than the ring was sized for"
        target = self._rows_SRW[self._slot, start:stop]
        target[:, : taps_NG.shape[1]] = taps_NG
        if self.with_final:
            assert final_ND is not None
            target[:, taps_NG.shape[1]:] = final_ND
        self._fill = stop
        return TapHandle(self._slot, start, stop)

    def rows(self, handle: TapHandle) -> Tensor:
        """A view [N, width] of a handle's rows, bf16."""
        return self._rows_SRW[handle.slot, handle.start:handle.stop]
