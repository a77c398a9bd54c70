"""What a sink is told, in order, each thing as soon as the states it speaks of can be read. Knows neither states nor sinks.

Where states are on the host already, as on a CPU, a call is made at once and nothing ever waits here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from tide_pipeline.engine.taps import Parcel

Call = Callable[[], None]


class Outbox:
    """`deliver` makes a call; it must not raise."""

    def __init__(self, deliver: Callable[[Call], None]) -> None:
        self._deliver = deliver
        self._waiting: deque[tuple[Call, Parcel | None]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def post(self, call: Call, parcel: Parcel | None = None) -> None:
        """Make this call after all that were posted before it, when `parcel` has arrived."""
        if parcel is None and not self._waiting:
            self._deliver(call)
        else:
            self._waiting.append((call, parcel))
            self.poll()

    def poll(self) -> None:
        """Make the calls whose turn has come. Never waits."""
        while self._waiting and ((parcel := self._waiting[0][1]) is None or parcel.is_ready()):
            self._hand_over()

    def flush(self) -> None:
        """Make all calls, waiting for what is under way."""
        while self._waiting:
            if (parcel := self._waiting[0][1]) is not None:
                parcel.wait()
            self._hand_over()

    def _hand_over(self) -> None:
        call, parcel = self._waiting.popleft()
        self._deliver(call)
        if parcel is not None:
            parcel.release()
