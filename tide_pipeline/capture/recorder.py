"""The engine's sink: events in, windows and acceptance rows out to the writer. Knows the ring and the control; knows no Parquet.

What it is told is only noted, and worked through together: when the ring asks for it, or when the engine has nothing to do. It never
blocks and never raises: what goes wrong with a request ends the collection of that request and is counted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tide_pipeline.capture.blocks import AcceptanceBlocks
from tide_pipeline.capture.control import CollectionControl
from tide_pipeline.capture.store import Root
from tide_pipeline.capture.windows import MAX_ROWS, ClosedWindow, RowShape, WindowAssembler
from tide_pipeline.capture.writer import LakeWriter
from tide_pipeline.config import CaptureSettings
from tide_pipeline.contracts import FinishReason, RequestClosed, RequestOpened, StepEvent
from tide_pipeline.engine.taps import TapRing

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Request:
    """What is known of a request in flight."""

    workload: str
    epoch: int                             # drafts that were served when it began
    blocks: AcceptanceBlocks
    windows: WindowAssembler | None        # None: not collected


@dataclass(frozen=True, slots=True)
class _Opened:
    request: RequestOpened
    epoch: int


class Recorder:
    """engine.protocol.Sink. Engine events come from one thread; `stats`, `flush` and `on_drafts_changed` from any."""

    def __init__(self, settings: CaptureSettings, target: str, lake: Root, replica: str, *,
                 max_window_rows: int = MAX_ROWS, clock: Callable[[], float] = time.time) -> None:
        self._settings, self._replica, self._clock, self._max_window_rows = settings, replica, clock, max_window_rows
        self._control = CollectionControl(settings)
        self._writer = LakeWriter(settings, target, lake, replica)
        self._ring: TapRing | None = None
        self._shape = RowShape(0, 0, False, "")
        self._requests: dict[str, _Request] = {}
        self._told: list[_Opened | Sequence[StepEvent] | RequestClosed] = []     # and not worked through yet
        self._epoch = 0                    # counts on_drafts_changed
        self._control_epoch = 0            # the last one that the control was told of
        self._captured_tokens = 0
        self._errors = 0

    def attach(self, ring: TapRing, engine_digest: str) -> None:
        """Called by the engine before its first event."""
        self._ring = ring
        self._shape = RowShape(ring.hidden_size, ring.num_taps, ring.with_final, engine_digest)
        self._requests, self._told = {}, []

    def on_open(self, opened: RequestOpened) -> None:
        self._told.append(_Opened(opened, self._epoch))

    def on_step(self, events: Sequence[StepEvent]) -> None:
        self._told.append(events)
        if self._ring is None or self._ring.must_read:
            self._catch_up()

    def on_close(self, closed: RequestClosed) -> None:
        self._told.append(closed)
        if self._ring is None or self._ring.must_read:
            self._catch_up()

    def on_idle(self) -> None:
        self._catch_up()

    def on_drafts_changed(self) -> None:
        """The draft agent swapped drafts: what is known of acceptance was another draft's. Requests in flight no longer count for it."""
        self._epoch += 1                   # the engine's thread passes it on: the control belongs to that thread

    def flush(self, timeout_s: float = 30.0) -> bool:
        """Write what is closed, now. False when the disk refused some of it."""
        return self._writer.flush(timeout_s)

    def close(self) -> None:
        """Count requests that never ended as cancelled, write all, stop the writer."""
        self._catch_up()
        for request_id in list(self._requests):
            self.on_close(RequestClosed(request_id, FinishReason.CANCELLED, 0.0, 0.0, 0))
        self._catch_up()
        self._writer.close()

    def stats(self) -> dict[str, int | float | bool | str]:
        """Counters since start, the writer's state, and per workload whether it is being collected."""
        return {"captured_tokens": self._captured_tokens, "recorder_errors": self._errors, **self._writer.stats(), **self._control.state()}

    def _catch_up(self) -> None:
        """Work through what was told since the last time."""
        for what in self._told:
            if isinstance(what, _Opened):
                self._guard("on_open", self._open, what)
            elif isinstance(what, RequestClosed):
                self._guard("on_close", self._close, what)
            else:
                self._step(what)
        self._told.clear()
        if self._ring is not None:
            self._ring.clear()

    def _open(self, told: _Opened) -> None:
        self._tell_drafts_changed(told.epoch)
        opened = told.request
        collect = self._ring is not None and self._control.should_collect(opened.workload, opened.tenant, self._clock())
        self._requests[opened.request_id] = _Request(
            workload=opened.workload, epoch=told.epoch,
            blocks=AcceptanceBlocks(opened, self._replica, self._shape.engine_digest, self._settings.block_steps,
                                    self._writer.offer_row, self._clock),
            windows=WindowAssembler(opened, self._shape, self._keep, self._clock,
                                    min(self._max_window_rows, self._shape.max_rows)) if collect else None)

    def _step(self, events: Sequence[StepEvent]) -> None:
        for event in events:
            request = self._requests.get(event.request_id)
            if request is None:
                continue
            try:
                request.blocks.add(event)
                if request.windows is not None:
                    request.windows.add(event, None if event.taps is None or self._ring is None else self._ring.words(event.taps))
            except Exception as error:
                request.windows = None
                self._count_error("on_step", error)

    def _close(self, closed: RequestClosed) -> None:
        request = self._requests.pop(closed.request_id, None)
        if request is None:
            return
        request.blocks.close(closed)
        if request.windows is not None:
            request.windows.close()
        self._tell_drafts_changed(self._epoch)
        if request.blocks.drafted_steps and request.epoch == self._control_epoch:
            self._control.observe(request.workload, request.blocks.accepted_first / request.blocks.drafted_steps)

    def _keep(self, window: ClosedWindow) -> None:
        if self._writer.offer_window(window):
            self._captured_tokens += window.num_rows
            self._control.spend(window.num_bytes, window.closed_at)

    def _tell_drafts_changed(self, epoch: int) -> None:
        if epoch > self._control_epoch:
            self._control_epoch = epoch
            self._control.on_draft_changed()

    def _guard(self, where: str, call: Callable[[T], None], what: T) -> None:
        try:
            call(what)
        except Exception as error:
            self._count_error(where, error)

    def _count_error(self, where: str, error: Exception) -> None:
        self._errors += 1
        if self._errors == 1:              # once: an engine step must not fill a log
            _log.warning("capture: %s failed (%s); serving goes on, see recorder_errors in stats", where, type(error).__name__)
