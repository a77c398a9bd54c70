"""The tap ring of a GPU: rows are written on the device and copied to the host beside the steps that follow. Knows no requests.

    device    ring of `slots` steps         put: in stream order
       │      side stream, an event each    ship: begins a copy when a host buffer is free
    host      two pinned buffers            rows: of a parcel that has arrived and is not released

The engine never waits: events are polled. A slot is free again when its parcel is released. When a sink falls behind by the whole ring,
the rows of a step are dropped and counted.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tide_pipeline.contracts import TapHandle
from tide_pipeline.engine.taps import HostTapRing, Parcel, StepRing
from tide_pipeline.models.device import to_device

BUFFERS = 2


class Done(Protocol):
    """Tells when a copy has ended; torch.cuda.Event is one."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


class Copier(Protocol):
    """Copies from the device to the host while the device goes on."""

    def room(self, rows: int, width: int) -> Tensor:
        """Host memory that it can copy to, bf16."""
        ...

    def start(self, source: Tensor, to: Tensor) -> Done:
        """Begin after what the device was told so far."""
        ...


class StreamCopier:
    """A side stream into pinned memory. Has not been run on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def room(self, rows: int, width: int) -> Tensor:
        return torch.empty(rows, width, dtype=torch.bfloat16, pin_memory=True)

    def start(self, source: Tensor, to: Tensor) -> Done:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
            event.record(self._stream)
        return event


class DeviceTapRing(StepRing):
    """`slots` buffers of `rows` rows on a device. A handle is good from its parcel's arrival to its release."""

    def __init__(self, slots: int, rows: int, hidden_size: int, num_taps: int, with_final: bool, device: torch.device,
                 copier: Copier) -> None:
        super().__init__(hidden_size, num_taps, with_final)
        self._rows_SRW = torch.zeros(slots, rows, self.width, dtype=torch.bfloat16, device=device)
        self._slot, self._fill = -1, 0
        self._copier = copier
        self._host = [copier.room(rows, self.width) for _ in range(BUFFERS)]
        self._free = list(range(BUFFERS))
        self._shipped: deque[SlotParcel] = deque()         # no host buffer yet
        self._busy: dict[int, SlotParcel] = {}             # by slot, from `ship` to `release`
        self._is_full = False

    def next_slot(self) -> None:
        following = (self._slot + 1) % self._rows_SRW.shape[0]
        self._is_full, self._fill = following in self._busy, 0
        if not self._is_full:
            self._slot = following

    def put(self, taps_NG: Tensor, final_ND: Tensor | None) -> TapHandle | None:
        if not self.is_read:
            return None
        n = len(taps_NG)
        if self._is_full:
            self.dropped_rows += n
            return None
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
        """One gather and one write, however many requests there are: rows that nobody keeps are not copied to the host."""
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
        if not self._fill:
            return None
        parcel = self._busy[self._slot] = SlotParcel(self, self._slot, self._fill)
        self._shipped.append(parcel)
        self.begin_copies()
        return parcel

    def words(self, handle: TapHandle) -> NDArray[np.int16]:
        buffer = self._busy[handle.slot].buffer
        assert buffer is not None
        words: NDArray[np.int16] = self._host[buffer][handle.start:handle.stop].view(torch.int16).numpy()
        return words

    def begin_copies(self) -> None:
        """In order, as far as there are host buffers."""
        while self._shipped and self._free:
            parcel = self._shipped.popleft()
            parcel.buffer = self._free.pop()
            parcel.done = self._copier.start(self._rows_SRW[parcel.slot, : parcel.fill], self._host[parcel.buffer][: parcel.fill])

    def free(self, parcel: SlotParcel) -> None:
        assert parcel.buffer is not None
        del self._busy[parcel.slot]
        self._free.append(parcel.buffer)
        self.begin_copies()


class SlotParcel:
    """What a step wrote to one slot of the ring."""

    def __init__(self, ring: DeviceTapRing, slot: int, fill: int) -> None:
        self.slot, self.fill = slot, fill
        self.buffer: int | None = None
        self.done: Done | None = None
        self._ring = ring

    def is_ready(self) -> bool:
        return self.done is not None and self.done.query()

    def wait(self) -> None:
        """Those shipped before it must have been released: a copy begins when a host buffer is free."""
        assert self.done is not None
        self.done.synchronize()

    def release(self) -> None:
        self._ring.free(self)


def tap_ring(slots: int, rows: int, hidden_size: int, num_taps: int, with_final: bool, device: torch.device) -> StepRing:
    """The one that the device wants."""
    if device.type == "cpu":
        return HostTapRing(hidden_size, num_taps, with_final)
    return DeviceTapRing(slots, rows, hidden_size, num_taps, with_final, device, StreamCopier(device))
