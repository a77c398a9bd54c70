"""What the sink hears of a TensorRT-LLM server, from one thread and in order. Knows requests' numbers and events; no server, no client.

    engine's thread    open, streamed, close        what clients are told
    server's thread    on_pass, on_broken           what capture saw (capture.Listener)

A request that capture follows is told of by its passes, states included. Without capture, or once it has ended, a request is told of by its
stream: as many tokens as a response adds were emitted by a step, one of them not drafted. Which tokens were refused stays unknown.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tide_pipeline.contracts import RequestClosed, RequestOpened, StepEvent, StepKind, TapHandle
from tide_pipeline.engine.ledger import Ledger
from tide_pipeline.engine.outbox import Outbox
from tide_pipeline.engine.protocol import NullSink, Sink, told
from tide_pipeline.engine.taps import Parcel
from tide_pipeline.engine.trtllm.layout import UNKNOWN, Decoder, End, Forward, LayoutBroken, Outcome, Step
from tide_pipeline.engine.trtllm.schedule import StepTimes
from tide_pipeline.engine.trtllm.shipment import Shipment

POLL_S = 0.0005                        # while copies are under way
LATE_S = 1.0                           # passes that come from another process may come after the answer: a request waits for them so long


@dataclass
class Followed:
    """One request in flight, as the sink knows it."""

    opened: RequestOpened
    end: End
    version: str                       # of the draft that it was given
    emitted: list[int] = field(default_factory=list)
    is_captured: bool = False


class Feed:
    """`start()` its thread, `close()` at the end. `is_capturing` is set by who has installed capture."""

    def __init__(self, sink: Sink, ledger: Ledger, times: StepTimes) -> None:
        self.is_capturing = False
        self.stop_capture: Callable[[str], None] = self.on_broken      # told why; calls `on_broken` in turn
        self._sink, self._ledger, self._times = sink, ledger, times
        self._lock = threading.Lock()                  # a request is known before its first pass is decoded
        self._decoder = Decoder()
        self._followed: dict[int, Followed] = {}
        self._late: dict[int, tuple[RequestClosed, tuple[int, ...], float]] = {}       # answered, its last passes not here yet
        self._opens: deque[RequestOpened] = deque()
        self._arrived_at = 0.0                         # of the last pass
        self._outbox = Outbox(self._deliver)
        self._entries: queue.SimpleQueue[tuple[Callable[[], None], Parcel | None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="tide-feed", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Tell all that is known, then close the sink."""
        self._entries.put(None)
        self._thread.join()

    # --- the engine's thread --------------------------------------------------------------------------------------

    @contextmanager
    def opening(self) -> Iterator[Callable[[int, RequestOpened, End, str], None]]:
        """Submit to the server inside; call what is given with the server's number of the request."""
        with self._lock:
            yield self._open

    def streamed(self, number: int, tokens: tuple[int, ...], draft_length: int, batch_size: int, step_ms: float) -> None:
        """A response of the server added these tokens; `draft_length` is what it verified at most."""
        self._entries.put((lambda: self._streamed(number, tokens, draft_length, batch_size, step_ms), None))

    def close_request(self, number: int, closed: RequestClosed, tokens: tuple[int, ...]) -> None:
        """`tokens`: all that the client was told."""
        self._entries.put((lambda: self._close(number, closed, tokens), None))

    # --- the server's thread --------------------------------------------------------------------------------------

    def on_pass(self, forward: Forward, shipment: Shipment, began: float) -> None:
        self._entries.put((lambda: self._pass(forward, shipment, began), shipment))

    def on_broken(self, why: str) -> None:
        self._entries.put((self._follow_streams, None))

    # --- its own --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                entry = self._entries.get(timeout=POLL_S if self._outbox or self._late else None)
            except queue.Empty:
                self._outbox.poll()
                self._end_late(time.monotonic())
                continue
            if entry is None:
                break
            self._outbox.post(*entry)
        self._outbox.flush()
        self._end_late(math.inf)
        self._tell(self._sink.close)

    def _deliver(self, call: Callable[[], None]) -> None:
        self._tell_opens()
        call()

    def _tell_opens(self) -> None:
        while self._opens:
            opened = self._opens.popleft()
            self._tell(lambda opened=opened: self._sink.on_open(opened))   # type: ignore[misc]

    def _tell(self, call: Callable[[], None]) -> None:
        """A sink that raises is replaced: serving goes on, and the count says so."""
        if not told(call):
            self._ledger.sink_errors += 1
            self._sink = NullSink()

    def _open(self, number: int, opened: RequestOpened, end: End, version: str) -> None:
        """Under the lock."""
        self._followed[number] = Followed(opened, end, version, is_captured=self.is_capturing)
        self._decoder.open(number, end)
        self._opens.append(opened)
        self._entries.put((lambda: None, None))

    def _pass(self, forward: Forward, shipment: Shipment, began: float) -> None:
        now = time.perf_counter()
        step_ms, self._arrived_at = (now - max(began, self._arrived_at)) * 1e3, now
        if not self.is_capturing:
            return
        new_tokens, lens, drafts = shipment.numbers()
        try:
            with self._lock:
                steps = self._decoder.decode(forward, Outcome(new_tokens, lens, drafts))       # type: ignore[arg-type]
        except LayoutBroken as error:
            self.stop_capture(str(error))
            return
        self._tell_opens()                             # of those that came while the lock was waited for
        batch = len(forward.contexts) + len(forward.generations)
        events = [self._event(step, shipment.handle, batch, step_ms) for step in steps if step.request in self._followed]
        if events:
            if forward.generations:
                self._ledger.engine_step(forward.draft_length, step_ms)
            self._tell(lambda: self._sink.on_step(events))
        self._end_late(time.monotonic())
        if not forward.contexts:
            self._times.observe(batch, forward.draft_length, step_ms)

    def _event(self, step: Step, whole: TapHandle | None, batch: int, step_ms: float) -> StepEvent:
        followed = self._followed[step.request]
        followed.emitted.extend(step.emitted)
        rows = None if whole is None else TapHandle(whole.slot, whole.start + step.rows.start, whole.start + step.rows.stop)
        return StepEvent(followed.opened.request_id, step.kind, step.start_pos, step.row_tokens, step.emitted, step.drafted, step.accepted,
                         followed.version, step.draft_length, batch, step_ms, rows)

    def _streamed(self, number: int, tokens: tuple[int, ...], draft_length: int, batch_size: int, step_ms: float) -> None:
        followed = self._followed.get(number)
        if followed is None or followed.is_captured or not tokens:
            return
        prompt, past = followed.opened.prompt_ids, followed.emitted
        if not past:
            event = StepEvent(followed.opened.request_id, StepKind.PREFILL, 0, prompt, tokens[:1], (), 0, followed.version, 0, batch_size,
                              step_ms, None)
        else:
            accepted = min(len(tokens) - 1, draft_length)
            drafted = (*tokens[:accepted], *[UNKNOWN] * (draft_length - accepted))
            kind, start_pos = StepKind.VERIFY if drafted else StepKind.DECODE, len(prompt) + len(past) - 1
            event = StepEvent(followed.opened.request_id, kind, start_pos, (past[-1], *tokens[:-1]), tokens, drafted, accepted,
                              followed.version, draft_length, batch_size, step_ms, None)
        past.extend(tokens)
        self._tell(lambda: self._sink.on_step((event,)))

    def _close(self, number: int, closed: RequestClosed, tokens: tuple[int, ...]) -> None:
        followed = self._followed.get(number)
        if followed is not None and followed.is_captured and len(followed.emitted) < len(tokens):
            self._late[number] = closed, tokens, time.monotonic() + LATE_S
        elif followed is not None:
            self._end(number, followed, closed, tokens)

    def _end_late(self, now: float) -> None:
        for number, (closed, tokens, due) in list(self._late.items()):
            followed = self._followed[number]
            if len(followed.emitted) >= len(tokens) or now >= due or not followed.is_captured:
                del self._late[number]
                self._end(number, followed, closed, tokens)

    def _end(self, number: int, followed: Followed, closed: RequestClosed, tokens: tuple[int, ...]) -> None:
        with self._lock:
            self._followed.pop(number, None)
            self._decoder.close(number)
        seen = tuple(followed.emitted)
        if followed.is_captured and seen[: len(tokens)] != tokens[: len(seen)]:
            self.stop_capture("tokens of the passes are not those that were answered")
        self._tell(lambda: self._sink.on_close(closed))

    def _follow_streams(self) -> None:
        """From now on no states: what requests in flight emit is read off their streams."""
        with self._lock:
            self.is_capturing = False
            for followed in self._followed.values():
                followed.is_captured = False
