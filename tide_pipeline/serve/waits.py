"""What clients wait for, and how their requests ended. Knows times and reasons; no request, no text."""

from __future__ import annotations

import threading
from collections import Counter

from tide_pipeline.contracts import FinishReason
from tide_pipeline.serve.histogram import Histogram


class Waits:
    """Counted by the threads that hand over and answer, read by the one that publishes."""

    def __init__(self) -> None:
        self.queue = Histogram()           # from a request's arrival to its first prompt chunk
        self.first_token = Histogram()     # from a request's arrival to its first token
        self._lock = threading.Lock()
        self._finished: Counter[str] = Counter()

    def finish(self, reason: FinishReason) -> None:
        with self._lock:
            self._finished[str(reason)] += 1

    def finished(self) -> dict[str, int]:
        """By finish reason; every reason is there from the start."""
        with self._lock:
            return {str(reason): self._finished[str(reason)] for reason in FinishReason}
