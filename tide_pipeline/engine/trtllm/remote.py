"""Passes fetched from rank 0 of a server that runs in Ray workers. The other end is ray_worker.py; nothing else knows of two processes.

A thread asks every POLL_S for what has arrived and hands it to the feed, whose sink then reads the states as from a ring. Ray carries
them through shared memory. When an answer fails, capture ends and serving goes on. Not run on GPUs.
"""

from __future__ import annotations

import itertools
import logging
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tide_pipeline.contracts import TapHandle
from tide_pipeline.engine.taps import TapRing
from tide_pipeline.engine.trtllm.capture import Listener

log = logging.getLogger(__name__)

POLL_S = 0.005                         # two passes wait in host memory at most, and four on the device


class ArrivedRing(TapRing):
    """Rows by number of their pass, each until it is released."""

    def __init__(self, hidden_size: int, num_taps: int) -> None:
        super().__init__(hidden_size, num_taps, False)
        self.passes: dict[int, NDArray[np.int16]] = {}

    def words(self, handle: TapHandle) -> NDArray[np.int16]:
        return self.passes[handle.slot][handle.start : handle.stop]


class Arrived:
    """A pass that is here; as shipment.Shipment."""

    def __init__(self, ring: ArrivedRing, number: int, numbers: list[Any], rows: Any) -> None:
        self._ring, self._number, self._numbers = ring, number, numbers
        self.handle = None
        if rows is not None:
            ring.passes[number] = rows
            self.handle = TapHandle(number, 0, len(rows))

    def is_ready(self) -> bool:
        return True

    def wait(self) -> None: ...

    def release(self) -> None:
        self._ring.passes.pop(self._number, None)

    def numbers(self) -> list[Any]:
        return self._numbers


class RemotePasses:
    """`start()` once LLM is there, `stop()` before it is shut down."""

    def __init__(self, rows: int, hidden_size: int, num_taps: int) -> None:
        self.ring = ArrivedRing(hidden_size, num_taps)
        self.faults = 0
        self._shape = rows, hidden_size, num_taps
        self._numbers = itertools.count()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, llm: Any, feed: Listener, device: str) -> bool:
        """Whether states will come; says why not."""
        self._llm, self._feed = llm, feed
        try:
            why = self._call("tide_begin", *self._shape, device)["why"]
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        if why:
            self._end(why)
            return False
        self._thread = threading.Thread(target=self._poll, name="tide-remote", daemon=True)
        self._thread.start()
        return True

    def broken(self, why: str) -> None:
        """The feed says that what came contradicts the layout."""
        self._stop.set()
        self._end(why)

    def stop(self) -> None:
        """Fetch what is left, then leave the workers as they were."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
            self._thread = None
            try:
                self._take()
                self._call("tide_end")
            except Exception as error:
                log.warning("a worker did not answer at the end: %s", type(error).__name__)

    def _poll(self) -> None:
        while not self._stop.wait(POLL_S):
            try:
                self._take()
            except Exception as error:
                self._stop.set()
                self._end(f"rank 0 does not answer ({type(error).__name__}: {error})")

    def _take(self) -> None:
        answer = self._call("tide_take")
        self.ring.dropped_rows = int(answer["dropped"])
        for forward, numbers, rows, began in answer["passes"]:
            self._feed.on_pass(forward, Arrived(self.ring, next(self._numbers), numbers, rows), began)   # type: ignore[arg-type]
        if answer["why"]:
            self._stop.set()
            self._end(answer["why"])

    def _call(self, method: str, *args: Any) -> Any:
        """Rank 0's answer, whether all ranks' come or its alone."""
        answer = self._llm._collective_rpc(method, args=args, unique_reply_rank=0)
        return answer[0] if isinstance(answer, list) else answer

    def _end(self, why: str) -> None:
        if self.faults:
            return
        self.faults = 1
        log.warning("states of the workers are not captured from here on, serving goes on without: %s", why)
        self._feed.on_broken(why)
