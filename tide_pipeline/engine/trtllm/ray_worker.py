"""What runs inside TensorRT-LLM's Ray workers when a target is split over GPUs: capture on rank 0, and a draft put in place on all.

Given to LLM as ray_worker_extension_cls="tide_pipeline.engine.trtllm.ray_worker.TideWorker": its methods become the worker's, and
`self.engine` is the worker's executor. Called through LLM._collective_rpc by remote.py. A prototype in TensorRT-LLM; not run on a GPU.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from tide_pipeline.contracts import TapHandle
from tide_pipeline.engine.trtllm import in_place
from tide_pipeline.engine.trtllm.capture import PassTap
from tide_pipeline.engine.trtllm.installed import installed_table, what_is_wrong
from tide_pipeline.engine.trtllm.layout import Forward
from tide_pipeline.engine.trtllm.shipment import Shipment, Shipper


class Spool:
    """Passes that wait to be fetched. A fetcher that does not come leaves the ring full, which drops states and counts them."""

    def __init__(self) -> None:
        self.passes: deque[tuple[Forward, Shipment, float]] = deque()
        self.why = ""                      # capture ended

    def on_pass(self, forward: Forward, shipment: Shipment, began: float) -> None:
        self.passes.append((forward, shipment, began))

    def on_broken(self, why: str) -> None:
        self.why = why


class TideWorker:
    """Mixed into the worker's class; every method returns plain values, as they travel between processes."""

    def tide_begin(self, rows: int, hidden_size: int, num_taps: int, device: str) -> dict[str, Any]:
        """Wrap the classes of this process. `why`: "" or why not."""
        if getattr(self, "rank", 0) != 0:
            return {"why": ""}
        table = installed_table()
        if wrong := what_is_wrong(table, "capture"):
            return {"why": "; ".join(wrong)}
        where = torch.device(device, torch.cuda.current_device()) if device != "cpu" else torch.device(device)
        self._tide_spool = Spool()
        self._tide_shipper = Shipper(rows, hidden_size, num_taps, where)
        self._tide_tap = PassTap(table, self._tide_shipper, self._tide_spool, num_taps)
        self._tide_tap.install()
        self._tide_tap.is_on = True
        return {"why": ""}

    def tide_take(self) -> dict[str, Any]:
        """Passes that have arrived in host memory: the record, the numbers, states as int16 (bf16 bits) or None."""
        if getattr(self, "rank", 0) != 0 or not hasattr(self, "_tide_spool"):
            return {"passes": [], "why": "", "dropped": 0}
        taken, passes = [], self._tide_spool.passes
        while passes and passes[0][1].is_ready():
            forward, shipment, began = passes.popleft()
            taken.append((forward, shipment.numbers(), self._rows(shipment.handle), began))
            shipment.release()
        return {"passes": taken, "why": self._tide_spool.why, "dropped": self._tide_shipper.ring.dropped_rows}

    def tide_end(self) -> None:
        if hasattr(self, "_tide_tap"):
            self._tide_tap.remove()

    def tide_put_draft(self, folder: str, digest: str) -> None:
        """On every rank. Raises BuildError."""
        in_place.load_draft(getattr(self, "engine"), folder, digest)  # noqa: B009 the worker's, not ours

    def _rows(self, handle: TapHandle | None) -> Any:
        return None if handle is None else self._tide_shipper.ring.rows(handle).clone().view(torch.int16).numpy()
