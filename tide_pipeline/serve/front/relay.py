"""Pass one request on to a replica, and its answer back as it comes. Knows replicas and framing; judges nothing.

A client that leaves closes the connection to the replica at once, and the engine frees the slot. A request goes to a second replica only
when the first could not be connected to: after its first byte nobody knows whether it ran. A request_id that is in flight goes to its own
replica, so that `stop` finds it and a second use is refused there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from tide_pipeline.serve.front.http import ClientReader, Garbled, Refused, Request, Response, end_to_end, render, status_line
from tide_pipeline.serve.front.replicas import Fleet, Replica
from tide_pipeline.serve.front.wire import Stalled, Wire

log = logging.getLogger(__name__)

RETRY = {"Retry-After": "1"}
DEADLINE_SLACK_S = 30.0            # of a replica's silence, beyond a request's own deadline


@dataclass(frozen=True)
class Limits:
    """What a client may take, and how long a replica may."""

    connections: int = 256             # one more is a 503
    head_bytes: int = 16_384           # a longer one is a 431
    body_bytes: int = 1_048_576        # a longer one is a 413
    idle_s: float = 75.0               # between two requests
    head_s: float = 10.0               # from a request's first byte to the end of its head, else a 408
    body_s: float = 30.0               # for the rest of it, else a 408
    connect_s: float = 2.0             # to a replica
    silence_s: float = 300.0           # of a replica, unless the request's own deadline_s is longer
    stall_s: float = 60.0              # of a client that does not read


@dataclass(frozen=True)
class Job:
    """A request to pass on."""

    request: Request
    body: bytes = b""
    request_id: str = ""
    deadline_s: float = 0.0

    def render(self) -> bytes:
        fields = end_to_end(self.request.fields)
        if self.request.method == "POST":
            fields.append(("Content-Length", str(len(self.body))))
        return render(f"{self.request.method} {self.request.path} HTTP/1.{self.request.minor}", fields) + self.body


class Relay:
    """`counts`: served, left (by their client), cut (by their replica), and the statuses that the front answered itself."""

    def __init__(self, fleet: Fleet, limits: Limits) -> None:
        self.fleet, self.limits = fleet, limits
        self.counts: Counter[str] = Counter()
        self.in_flight = 0
        self.stopping = False
        self._by_id: dict[str, Replica] = {}

    async def pass_on(self, job: Job, reader: ClientReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the client's connection can go on. Raises Refused while nothing has been sent, CancelledError when the client left."""
        task = asyncio.current_task()
        assert task is not None
        reader.on_gone = task.cancel
        self.in_flight += 1
        try:
            if reader.gone:
                raise asyncio.CancelledError
            return await self._find_and_run(job, reader, writer)
        except asyncio.CancelledError:
            self.counts["left"] += reader.gone
            raise
        finally:
            self.in_flight -= 1
            reader.on_gone = lambda: None

    async def _find_and_run(self, job: Job, reader: ClientReader, writer: asyncio.StreamWriter) -> bool:
        tried: list[Replica] = []
        while (replica := self._choose(job.request_id, tried)) is not None:
            with replica.serving():
                try:
                    wire = await self._connect(replica)
                except (OSError, TimeoutError) as error:
                    log.warning("%s can't be connected to: %s", replica.spec.name, type(error).__name__)
                    self.fleet.mark(replica, False)
                    tried.append(replica)
                    continue
                with self._holding(job.request_id, replica):
                    return await self._run(job, replica, wire, reader, writer)
        raise Refused(503, "no replica takes requests: try again soon", RETRY)

    def _choose(self, request_id: str, tried: list[Replica]) -> Replica | None:
        holder = self._by_id.get(request_id)
        return holder if holder is not None and holder not in tried else self.fleet.pick(tried)

    async def _connect(self, replica: Replica) -> Wire:
        if (kept := replica.take_idle()) is not None:
            return kept
        async with asyncio.timeout(self.limits.connect_s):
            return await Wire.open(*replica.spec.address)

    @contextlib.contextmanager
    def _holding(self, request_id: str, replica: Replica) -> Iterator[None]:
        is_first = bool(request_id) and request_id not in self._by_id
        if is_first:
            self._by_id[request_id] = replica
        try:
            yield
        finally:
            if is_first:
                del self._by_id[request_id]

    async def _run(self, job: Job, replica: Replica, wire: Wire, reader: ClientReader, writer: asyncio.StreamWriter) -> bool:
        response, is_whole, limits = None, False, self.limits
        silence_s = max(limits.silence_s, job.deadline_s + DEADLINE_SLACK_S if job.deadline_s else 0.0)
        try:
            wire.send(job.render())
            response = await wire.read_response(silence_s)
            keeps_alive = job.request.keeps_alive and response.length != -1 and not self.stopping
            await wire.copy(response.length, _head(response, keeps_alive), writer, silence_s=silence_s, stall_s=limits.stall_s)
            is_whole = True
        except (Garbled, OSError, TimeoutError, Stalled) as error:
            if reader.gone or isinstance(error, Stalled):
                self.counts["left"] += 1
            else:
                self._blame(replica, error, was_silent=response is None)
            writer.transport.abort()                       # the client must not take a part for the whole
            return False
        finally:
            if not is_whole:
                wire.abort()
        replica.served += 1
        self.counts["served"] += 1
        replica.keep(wire) if response.keeps_alive else wire.close()
        return keeps_alive

    def _blame(self, replica: Replica, error: Exception, *, was_silent: bool) -> None:
        """Raises Refused when the client can still be told."""
        what = type(error).__name__
        replica.failed += 1
        log.warning("%s did not answer to the end: %s", replica.spec.name, what)
        if was_silent:
            raise Refused(502, f"{replica.spec.name} did not answer ({what}): it may have run the request") from error
        self.counts["cut"] += 1


def _head(response: Response, keeps_alive: bool) -> bytes:
    """For the client; the body stays framed as the replica did it."""
    fields = end_to_end(response.fields)
    if response.status == 503:                             # its queue is full
        fields += RETRY.items()
    if response.length is None:
        fields.append(("Transfer-Encoding", "chunked"))
    elif response.length >= 0 and response.status not in (204, 304):
        fields.append(("Content-Length", str(response.length)))
    return render(status_line(response.status), fields if keeps_alive else [*fields, ("Connection", "close")])
