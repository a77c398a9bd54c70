"""Requests between Triton and the engine: hands them over, and frees the slot of a client that has left. Knows no tensors.

Only `places` requests wait inside the engine. `take` blocks until there is room, so that the others wait in Triton's queue: its
overflow is the only one that Triton 2.51 answers with 503, because all errors of a model's own arrive as 400 on /generate.
"""

from __future__ import annotations

import threading
import time

from tide_pipeline.engine.protocol import Engine, TokenStream
from tide_pipeline.errors import EngineClosed, InvalidRequest
from tide_pipeline.serve.answer import Answer, Reply
from tide_pipeline.serve.request import Asked
from tide_pipeline.serve.waits import Waits


class Desk:
    """`take` is called by Triton's thread, `admitted` and `ended` by the engine's, `sweep` by a watcher's."""

    def __init__(self, places: int) -> None:
        self.waits = Waits()
        self._places = places
        self._changed = threading.Condition()
        self._waiting: set[str] = set()                # submitted, not yet out of the engine's queue
        self._answers: dict[str, Answer] = {}
        self._streams: dict[str, TokenStream] = {}
        self._closing = False

    def take(self, engine: Engine, asked: Asked, reply: Reply) -> None:
        """Submit a request; its answer goes to `reply`. Raises what `Engine.submit` raises."""
        request_id = asked.request.request_id
        answer = Answer(asked, reply, self.ended, self.waits)
        with self._changed:
            self._changed.wait_for(lambda: self._closing or len(self._waiting) < self._places)
            if self._closing:
                raise EngineClosed("the engine is shutting down: send the request to another replica")
            if request_id in self._answers:
                raise InvalidRequest(f"request_id {request_id!r} is in use by a running request: choose another")
            self._waiting.add(request_id)
            self._answers[request_id] = answer
        try:
            stream = engine.submit(asked.request, answer)
        except Exception:
            self.ended(request_id)
            raise
        with self._changed:
            if request_id in self._answers:            # it may have ended already
                self._streams[request_id] = stream

    def admitted(self, request_id: str) -> None:
        """The request left the engine's queue."""
        with self._changed:
            answer = self._answers.get(request_id)
            self._waiting.discard(request_id)
            self._changed.notify()
        if answer is not None:
            self.waits.queue.observe(time.monotonic() - answer.asked.began)

    def ended(self, request_id: str) -> None:
        with self._changed:
            self._waiting.discard(request_id)
            self._answers.pop(request_id, None)
            self._streams.pop(request_id, None)
            self._changed.notify()

    def cancel(self, request_id: str) -> bool:
        """False when no request of that id is in flight."""
        with self._changed:
            stream = self._streams.get(request_id)
        if stream is not None:
            stream.cancel()
        return stream is not None

    def sweep(self) -> int:
        """Cancel the requests whose clients have left; how many."""
        with self._changed:
            watched = [(self._answers[request_id], stream) for request_id, stream in self._streams.items()]
        gone = [stream for answer, stream in watched if answer.reply.is_cancelled()]
        for stream in gone:
            stream.cancel()
        return len(gone)

    def close(self) -> None:
        """Refuse new requests; what the engine still ends is told "unavailable"."""
        with self._changed:
            self._closing = True
            for answer in self._answers.values():
                answer.is_closing = True
            self._changed.notify_all()
