"""A pass's states and tokens on their way from the server's thread to ours. Knows tensors and two threads; no request, nothing private.

    server's thread    ship()      device to device into the ring, in stream order; a side stream goes on to pinned memory
    our thread         is_ready, numbers, release

States go through the embedded engine's ring (engine/tap_copies.py): a full one drops them, and counts. Tokens are a few bytes and are
never dropped: positions follow from them, so without them nothing after would be known.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from tide_pipeline.contracts import TapHandle
from tide_pipeline.engine.memory import RING_SLOTS
from tide_pipeline.engine.tap_copies import Copier, DeviceTapRing, Done, SlotParcel, StreamCopier

HOST_SLOTS = 64                        # steps in a ring in host memory: it is no GPU's, and its steps are short


class ServerCopier(StreamCopier):
    """Copies begin after what the server's own stream was told, whichever thread asks. Has not been run on a GPU."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.written = torch.cuda.current_stream(device)

    def start(self, source: Tensor, to: Tensor) -> Done:
        self._stream.wait_stream(self.written)
        return super().start(source, to)


class Ended:
    """A copy that was over when it returned."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...


class HostCopier:
    """For states in host memory: a copy is made at once."""

    def room(self, rows: int, width: int) -> Tensor:
        return torch.empty(rows, width, dtype=torch.bfloat16)

    def start(self, source: Tensor, to: Tensor) -> Done:
        to.copy_(source)
        return Ended()


class Shipment:
    """One pass; engine.taps.Parcel."""

    def __init__(self, shipper: Shipper, handle: TapHandle | None, rows: SlotParcel | None, source: Tensor, host: Tensor, done: Done,
                 shapes: Sequence[tuple[int, ...]]) -> None:
        self.handle = handle                       # all of its rows; None: dropped
        self._shipper, self._rows, self._host, self._done, self._shapes = shipper, rows, host, done, shapes
        self._source = source                      # lives as long as it is copied

    def is_ready(self) -> bool:
        return self._done.query() and (self._rows is None or self._rows.is_ready())

    def wait(self) -> None:
        self._done.synchronize()
        if self._rows is not None:
            self._rows.wait()

    def release(self) -> None:
        if self._rows is not None:
            with self._shipper.lock:
                self._rows.release()

    def numbers(self) -> list[list[int] | list[list[int]]]:
        """The integer tensors that were given, in their order. Once it is ready."""
        flat, out, at = self._host.view(torch.int32).flatten(), [], 0
        for shape in self._shapes:
            size = torch.Size(shape).numel()
            out.append(flat[at : at + size].view(shape).tolist())
            at += size
        return out


class Shipper:
    """The ring of one server. `lock` keeps its two threads apart: what they do under it is bookkeeping, no copy is waited for."""

    def __init__(self, rows: int, hidden_size: int, num_taps: int, device: torch.device, copier: Copier | None = None) -> None:
        self.copier: Copier = copier or (HostCopier() if device.type == "cpu" else ServerCopier(device))
        slots = HOST_SLOTS if device.type == "cpu" and copier is None else RING_SLOTS
        self.ring = DeviceTapRing(slots, rows, hidden_size, num_taps, False, device, self.copier)
        self.lock = threading.Lock()
        self._rows = rows

    def ship(self, rows_NG: Tensor, numbers: Sequence[Tensor]) -> Shipment:
        """Called right after a pass, in its thread and stream. A pass that is wider than the ring loses its states."""
        if isinstance(self.copier, ServerCopier):
            self.copier.written = torch.cuda.current_stream(rows_NG.device)
        with torch.no_grad():
            source = torch.cat([n.reshape(-1).to(torch.int32) for n in numbers]).view(torch.bfloat16).unsqueeze(0)
            host = self.copier.room(1, source.shape[1])
            done = self.copier.start(source, host)
            with self.lock:
                handle, parcel = self._put(rows_NG)
        return Shipment(self, handle, parcel, source, host, done, [tuple(n.shape) for n in numbers])

    def _put(self, rows_NG: Tensor) -> tuple[TapHandle | None, SlotParcel | None]:
        self.ring.next_slot()
        if len(rows_NG) > self._rows:
            self.ring.dropped_rows += len(rows_NG)
            return None, None
        handle, parcel = self.ring.put(rows_NG, None), self.ring.ship()
        assert parcel is None or isinstance(parcel, SlotParcel)
        return handle, parcel
