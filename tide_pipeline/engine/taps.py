"""The ring of tapped states that a step leaves behind. Fixed memory; knows neither requests nor files."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tide_pipeline.contracts import TapHandle
from tide_pipeline.models.device import to_device


class Parcel(Protocol):
    """The rows of one step, on their way to where a sink can read them."""

    def is_ready(self) -> bool:
        """Whether they have arrived. Never waits."""
        ...

    def wait(self) -> None: ...

    def release(self) -> None:
        """The sink has copied what it keeps."""
        ...


class TapRing:
    """`slots` buffers of `rows` state rows, bf16. A row is [taps of the captured layers | final post-norm state].

    On a CPU a row is written by the step itself, so a handle is good until the next `slots` steps have run;
    sinks copy what they keep before `on_step` returns. engine/tap_copies.py has the ring of a GPU.
    """

    def __init__(self, slots: int, rows: int, hidden_size: int, num_taps: int, with_final: bool,
                 device: torch.device | None = None) -> None:
        self.hidden_size, self.num_taps, self.with_final = hidden_size, num_taps, with_final
        self.width = hidden_size * (num_taps + int(with_final))
        self.is_read = True                # False: no sink looks at the rows, and none are kept
        self.dropped_rows = 0
        self._rows_SRW = torch.zeros(slots, rows, self.width, dtype=torch.bfloat16, device=device)
        self._words: list[NDArray[np.int16]] = list(self._rows_SRW.view(torch.int16).numpy()) if self._rows_SRW.is_cpu else []
        self._slot = -1
        self._fill = 0

    def next_slot(self) -> None:
        """Begin a step."""
        self._slot = (self._slot + 1) % self._rows_SRW.shape[0]
        self._fill = 0

    def put(self, taps_NG: Tensor, final_ND: Tensor | None) -> TapHandle | None:
        """Append rows of the current step: taps [N, num_taps * D] and final states [N, D], any float type. None: not kept."""
        if not self.is_read:
            return None
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

    def put_each(self, taps_NG: Tensor, final_ND: Tensor | None, kept: Sequence[range]) -> list[TapHandle | None]:
        """Append these rows of a step, a handle for each range: one gather and one write, however many requests there are."""
        chosen = [row for rows in kept for row in rows]
        if self.is_read and len(chosen) < len(taps_NG):
            index = to_device(torch.tensor(chosen), taps_NG.device)
            taps_NG, final_ND = taps_NG[index], None if final_ND is None else final_ND[index]
        whole = self.put(taps_NG, final_ND)
        if whole is None:
            return [None] * len(kept)
        ends = itertools.accumulate(map(len, kept), initial=whole.start)
        return [TapHandle(whole.slot, start, stop) for start, stop in itertools.pairwise(ends)]

    def ship(self) -> Parcel | None:
        """End a step. None: its rows can be read at once."""
        return None

    def rows(self, handle: TapHandle) -> Tensor:
        """A view [N, width] of a handle's rows, bf16."""
        return self._rows_SRW[handle.slot, handle.start:handle.stop]

    def words(self, handle: TapHandle) -> NDArray[np.int16]:
        """The same rows' bits; a slice of numpy is several times as cheap as one of torch."""
        return self._words[handle.slot][handle.start:handle.stop]
