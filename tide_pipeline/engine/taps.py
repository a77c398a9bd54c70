"""The rings of tapped states that steps leave behind for a sink. Know neither requests nor files.

A row is [taps of the captured layers | final post-norm state], bf16. On a host, where a step's tensors stay as they are, the ring
keeps the tensors and makes rows of many steps at once, when they are read: beside a network every small operation of a step costs
several times what it does in a loop, since nothing of it is in the processor's caches. engine/tap_copies.py has the ring of a GPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tide_pipeline.contracts import TapHandle

HOST_STEPS = 64                        # whose rows a host's ring holds
UNREAD_STEPS = 32                      # after which its sink must read, and
UNREAD_ROWS = 128


class Parcel(Protocol):
    """The rows of one step, on their way to where a sink can read them."""

    def is_ready(self) -> bool:
        """Whether they have arrived. Never waits."""
        ...

    def wait(self) -> None: ...

    def release(self) -> None:
        """The sink has copied what it keeps."""
        ...


class TapRing(ABC):
    """What a sink reads rows from, by handle, in the thread that tells it of them."""

    def __init__(self, hidden_size: int, num_taps: int, with_final: bool) -> None:
        self.hidden_size, self.num_taps, self.with_final = hidden_size, num_taps, with_final
        self.width = hidden_size * (num_taps + int(with_final))
        self.is_read = True                # False: no sink looks at the rows, and none are kept
        self.dropped_rows = 0

    @abstractmethod
    def words(self, handle: TapHandle) -> NDArray[np.int16]:
        """The bits of a handle's rows [N, width], to be copied; a slice of numpy is several times as cheap as one of torch."""

    def rows(self, handle: TapHandle) -> Tensor:
        """The same as bf16 [N, width]."""
        return torch.from_numpy(self.words(handle)).view(torch.bfloat16)

    @property
    def must_read(self) -> bool:
        """Whether rows may be gone after the next step: a sink then reads before `on_step` returns."""
        return True

    def clear(self) -> None:
        """The sink has read all it wants of the steps so far."""
        return


class StepRing(TapRing):
    """What an engine's steps put rows into."""

    @abstractmethod
    def next_slot(self) -> None:
        """Begin a step."""

    @abstractmethod
    def put(self, taps_NG: Tensor, final_ND: Tensor | None) -> TapHandle | None:
        """Add rows to the current step: taps [N, num_taps * D] and final states [N, D], any float type. None: not kept."""

    @abstractmethod
    def put_each(self, taps_NG: Tensor, final_ND: Tensor | None, kept: Sequence[range]) -> list[TapHandle | None]:
        """Add these rows of a step, in ascending order, a handle for each range."""

    def ship(self) -> Parcel | None:
        """End a step. None: its rows can be read at once."""
        return None


class HostTapRing(StepRing):
    """Of a CPU; one `put` a step. A handle is good until `HOST_STEPS` more steps have run, or `clear`."""

    def __init__(self, hidden_size: int, num_taps: int, with_final: bool) -> None:
        super().__init__(hidden_size, num_taps, with_final)
        self._unread: dict[int, tuple[Tensor, Tensor | None]] = {}             # by step
        self._read: dict[int, NDArray[np.int16]] = {}
        self._step = self._unread_rows = 0

    def next_slot(self) -> None:
        self._step += 1
        gone = self._step - HOST_STEPS
        self._read.pop(gone, None)
        self._unread.pop(gone, None)

    def put(self, taps_NG: Tensor, final_ND: Tensor | None) -> TapHandle | None:
        (handle,) = self.put_each(taps_NG, final_ND, [range(len(taps_NG))])
        return handle

    def put_each(self, taps_NG: Tensor, final_ND: Tensor | None, kept: Sequence[range]) -> list[TapHandle | None]:
        if not self.is_read:
            return [None] * len(kept)
        step = self._step
        assert step not in self._unread and step not in self._read, "two puts in a step"
        self._unread[step] = taps_NG, final_ND
        self._unread_rows += kept[-1].stop
        return [TapHandle(step, rows.start, rows.stop) for rows in kept]

    def words(self, handle: TapHandle) -> NDArray[np.int16]:
        if handle.slot in self._unread:
            self._read_all()
        return self._read[handle.slot][handle.start:handle.stop]

    @property
    def must_read(self) -> bool:
        return len(self._unread) >= UNREAD_STEPS or self._unread_rows >= UNREAD_ROWS

    def clear(self) -> None:
        self._unread.clear()
        self._read.clear()
        self._unread_rows = 0

    def _read_all(self) -> None:
        """Rows of all steps that were not read yet, in one go."""
        rows_NW = torch.cat([taps for taps, _ in self._unread.values()])
        if self.with_final:
            rows_NW = torch.cat((rows_NW, torch.cat([final for _, final in self._unread.values() if final is not None])), dim=1)
        words_NW = rows_NW.bfloat16().view(torch.int16).numpy()                # torch bf16 has no numpy type
        start = 0
        for step, (taps_NG, _) in self._unread.items():
            self._read[step] = words_NW[start:start + len(taps_NG)]
            start += len(taps_NG)
        self._unread.clear()
        self._unread_rows = 0
