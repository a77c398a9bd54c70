"""Sends responses from a thread of its own, so that the engine's next step does not wait for Triton. Knows no Triton.

A response costs Triton's Python backend a round trip between processes, a good third of a millisecond in which the caller only waits.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

from tide_pipeline.serve.histogram import Histogram

log = logging.getLogger(__name__)


class Outbox:
    """Calls what it is given, in that order. `delay` tells how long each had to wait for its end."""

    def __init__(self) -> None:
        self.delay = Histogram()
        self._calls: queue.SimpleQueue[tuple[float, Callable[[], None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="tide-outbox", daemon=True)
        self._thread.start()

    def put(self, call: Callable[[], None]) -> None:
        self._calls.put((time.perf_counter(), call))

    def waiting(self) -> int:
        return self._calls.qsize()

    def close(self) -> None:
        """Returns when everything that was put has been called."""
        self._calls.put(None)
        self._thread.join()

    def _next(self) -> tuple[float, Callable[[], None]] | None:
        """Waits. A function of its own, so that a profile can tell waiting from work."""
        return self._calls.get()

    def _run(self) -> None:
        while (entry := self._next()) is not None:
            put_at, call = entry
            try:
                call()
            except Exception as error:                     # its text could quote an answer
                log.error("a response could not be sent: %s", type(error).__name__)
            self.delay.observe(time.perf_counter() - put_at)
