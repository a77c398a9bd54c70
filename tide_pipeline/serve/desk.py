"""Requests between Triton and the engine: hands them over, and frees the slot of a client that has left. Knows no tensors.

Only `places` requests wait inside the engine. `take` waits for room, so that the others wait in Triton's queue: its overflow is the only
one that Triton 2.51 answers with 503, because all errors of a model's own arrive as 400 on /generate. But it never waits for long: a server
whose stub has been in `execute` for a second asks whether it lives, and ends itself (lock_exception) when the stub had no CPU meanwhile.
What found no room by then is parked here, first come first served: two requests a second at most, and only while all is full anyway.
"""

from __future__ import annotations

import threading
import time
from collections import deque

from tide_pipeline.contracts import FinishReason, TokenChunk
from tide_pipeline.engine.protocol import Engine, TokenStream
from tide_pipeline.errors import EngineClosed, InvalidRequest
from tide_pipeline.serve.answer import Answer, Reply, kind_of
from tide_pipeline.serve.request import Asked
from tide_pipeline.serve.waits import Waits

LONGEST_TAKE_S = 0.5


class Desk:
    """`take` is called by Triton's thread, `admitted` and `ended` by the engine's, `sweep` by a watcher's."""

    def __init__(self, places: int) -> None:
        self.waits = Waits()
        self._places = places
        self._changed = threading.Condition()
        self._waiting: set[str] = set()                # submitted, not yet out of the engine's queue
        self._parked: deque[tuple[Engine, Answer]] = deque()
        self._answers: dict[str, Answer] = {}          # of all that have not ended
        self._streams: dict[str, TokenStream] = {}     # of those that were submitted
        self._closing = False
        self._door: threading.Thread | None = None

    def take(self, engine: Engine, asked: Asked, reply: Reply) -> None:
        """Submit a request; its answer goes to `reply`. Raises what `Engine.submit` raises, or tells `reply` if it had to be parked."""
        request_id = asked.request.request_id
        answer = Answer(asked, reply, self.ended, self.waits)
        with self._changed:
            has_room = self._changed.wait_for(lambda: self._closing or (not self._parked and self._has_room()), LONGEST_TAKE_S)
            if self._closing:
                raise EngineClosed("the engine is shutting down: send the request to another replica")
            if request_id in self._answers:
                raise InvalidRequest(f"request_id {request_id!r} is in use by a running request: choose another")
            self._answers[request_id] = answer
            if not has_room:
                self._park(engine, answer)
                return
            self._waiting.add(request_id)
        self._submit(engine, answer)

    def admitted(self, request_id: str) -> None:
        """The request left the engine's queue."""
        with self._changed:
            answer = self._answers.get(request_id)
            self._waiting.discard(request_id)
            self._changed.notify_all()
        if answer is not None:
            self.waits.queue.observe(time.monotonic() - answer.asked.began)

    def ended(self, request_id: str) -> None:
        with self._changed:
            self._waiting.discard(request_id)
            self._answers.pop(request_id, None)
            self._streams.pop(request_id, None)
            self._changed.notify_all()

    def parked(self) -> int:
        return len(self._parked)

    def cancel(self, request_id: str) -> bool:
        """False when no request of that id is in flight."""
        with self._changed:
            stream, answer = self._streams.get(request_id), self._answers.get(request_id)
        if stream is not None:
            stream.cancel()
        return stream is not None or (answer is not None and self._drop(answer, FinishReason.CANCELLED))

    def sweep(self) -> int:
        """Cancel the requests whose clients have left, and end parked ones at their deadline; how many."""
        with self._changed:
            watched = [(self._answers[request_id], stream) for request_id, stream in self._streams.items()]
            parked = [answer for _, answer in self._parked]
        gone = [stream for answer, stream in watched if answer.reply.is_cancelled()]
        for stream in gone:
            stream.cancel()
        return len(gone) + sum(self._drop(answer, reason) for answer in parked if (reason := _why_over(answer)) is not None)

    def close(self) -> None:
        """Refuse new requests; what is parked, and what the engine still ends, is told "unavailable"."""
        with self._changed:
            self._closing = True
            for answer in self._answers.values():
                answer.is_closing = True
            parked = [answer for _, answer in self._parked]
            self._changed.notify_all()
        for answer in parked:
            self._drop(answer, FinishReason.CANCELLED)

    def _has_room(self) -> bool:
        return len(self._waiting) < self._places

    def _submit(self, engine: Engine, answer: Answer) -> None:
        request_id = answer.asked.request.request_id
        try:
            stream = engine.submit(answer.asked.request, answer)
        except Exception:
            self.ended(request_id)
            raise
        with self._changed:
            if request_id in self._answers:            # it may have ended already
                self._streams[request_id] = stream

    def _park(self, engine: Engine, answer: Answer) -> None:
        self._parked.append((engine, answer))
        if self._door is None:
            self._door = threading.Thread(target=self._admit_parked, name="tide-door", daemon=True)
            self._door.start()

    def _admit_parked(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or (self._parked and self._has_room()))
                if self._closing:
                    return
                engine, answer = self._parked.popleft()
                self._waiting.add(answer.asked.request.request_id)
                self._changed.notify_all()
            try:
                self._submit(engine, answer)
            except Exception as error:                 # nobody waits for it in `take`
                answer.reply.fail(kind_of(error), str(error))

    def _drop(self, answer: Answer, reason: FinishReason) -> bool:
        """End a request that is parked; False when it is not any more."""
        with self._changed:
            kept = [entry for entry in self._parked if entry[1] is not answer]
            if len(kept) == len(self._parked):
                return False
            self._parked = deque(kept)
        answer(TokenChunk(answer.asked.request.request_id, (), "", reason))
        return True


def _why_over(answer: Answer) -> FinishReason | None:
    if answer.reply.is_cancelled():
        return FinishReason.CANCELLED
    return FinishReason.DEADLINE if time.monotonic() - answer.asked.began > answer.asked.request.deadline_s else None
