"""One connection to a replica: heads read, bodies copied straight to the client. Knows framing; knows no Triton.

The body of an answer never wakes a task: what arrives from one socket is written to the other in the same callback, framed as it came.
"""

from __future__ import annotations

import asyncio

from tide_pipeline.errors import TideError
from tide_pipeline.serve.front.http import CHUNK, Garbled, Response, parse_response

HEAD_BYTES = 65_536                # of an answer
LINE_BYTES = 8_192                 # a chunk's size, or a trailer
CONGESTED = 65_536                 # bytes that wait for a client: asyncio's own high-water mark


class Stalled(TideError):
    """The client does not read."""


class Body:
    """Where an answer's body ends."""

    def __init__(self, length: int | None) -> None:
        self.ended = length == 0
        self.ends_with_connection = length == -1
        self._in_chunks = length is None
        self._in_trailers = False
        self._left = length or 0           # bytes until the next line, or the end
        self._line = b""

    def feed(self, data: bytes) -> int:
        """How many of these bytes belong to it. Raises Garbled."""
        at = 0
        while at < len(data) and not self.ended:
            if self.ends_with_connection:
                at = len(data)
            elif self._left:
                step = min(self._left, len(data) - at)
                at, self._left = at + step, self._left - step
                self.ended = not self._left and not self._in_chunks
            else:
                end = data.find(b"\n", at) + 1 or len(data)
                self._line, at = self._line + data[at:end], end
                self._judge_line()
        return at

    def _judge_line(self) -> None:
        if len(self._line) > LINE_BYTES:
            raise Garbled("a chunk has no size")
        if not self._line.endswith(b"\n"):
            return
        line, self._line = self._line, b""
        if self._in_trailers:
            self.ended = line == b"\r\n"
        elif match := CHUNK.fullmatch(line):
            size = int(match[1], 16)
            self._left, self._in_trailers = (size + len(b"\r\n"), False) if size else (0, True)
        else:
            raise Garbled("a chunk has no size")


class Wire(asyncio.Protocol):
    """Made by `Wire.open`. One answer at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._early = b""                  # came, and belongs to nobody yet
        self._body: Body | None = None
        self._client: asyncio.WriteTransport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._error: Garbled | None = None
        self._is_lost = False
        self._heard_at = 0.0

    @classmethod
    async def open(cls, host: str, port: int) -> Wire:
        """Raises OSError."""
        return (await asyncio.get_running_loop().create_connection(cls, host, port))[1]

    @property
    def is_idle(self) -> bool:
        """Whether another request can be sent: the connection is whole and the replica has said nothing unasked."""
        return not self._is_lost and not self._early and self._transport is not None and not self._transport.is_closing()

    def send(self, data: bytes) -> None:
        self._there.write(data)
        self._heard_at = self._loop.time()

    async def read_response(self, silence_s: float) -> Response:
        """The next head, past "100 Continue" and its kind. Raises Garbled, TimeoutError."""
        while True:
            head, mark, rest = self._early.partition(b"\r\n\r\n")
            if mark:
                self._early, response = rest, parse_response(head + mark)
                if response.status >= 200:
                    return response
            elif len(self._early) > HEAD_BYTES:
                raise Garbled("the answer's head is too long")
            else:
                await self._news(silence_s)

    async def copy(self, length: int | None, head: bytes, writer: asyncio.StreamWriter, *, silence_s: float, stall_s: float) -> None:
        """Write `head`, then the body as it comes, until it has ended. Raises Garbled, TimeoutError (a silent replica), Stalled."""
        body = self._body = Body(length)
        self._client = writer.transport
        early, self._early = self._early, b""
        self._pour(early, head)
        while True:
            if self._error is not None:
                raise self._error
            if writer.transport.get_write_buffer_size() > CONGESTED:
                await _drain(writer, stall_s)
                self._there.resume_reading()
            elif body.ended:
                return
            else:
                await self._news(silence_s)

    def close(self) -> None:
        self._there.close()

    def abort(self) -> None:
        self._there.abort()

    # --- asyncio calls these -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        if self._body is None:
            self._early += data
            self._wake()
        else:
            self._pour(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True
        if self._body is not None and self._body.ends_with_connection and exc is None:
            self._body.ended = True
        self._wake()

    # -------------------------------------------------------------------------------------------------------------

    @property
    def _there(self) -> asyncio.Transport:
        assert self._transport is not None, "not open"
        return self._transport

    def _pour(self, data: bytes, head: bytes = b"") -> None:
        body, client = self._body, self._client
        assert body is not None and client is not None
        try:
            mine = body.feed(data)
        except Garbled as error:
            self._error = error
            return self._wake()
        client.write(head + data[:mine])
        if body.ended:
            self._body, self._early = None, data[mine:]
            self._wake()
        elif client.get_write_buffer_size() > CONGESTED:
            self._there.pause_reading()
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _news(self, silence_s: float) -> None:
        """Until something has changed. Raises Garbled when nothing can any more, TimeoutError after so long without a byte."""
        if self._is_lost:
            raise Garbled("the connection was closed")
        while True:
            self._waiter = self._loop.create_future()
            try:
                async with asyncio.timeout_at(self._heard_at + silence_s):
                    return await self._waiter
            except TimeoutError:
                if self._loop.time() >= self._heard_at + silence_s:
                    raise


async def _drain(writer: asyncio.StreamWriter, stall_s: float) -> None:
    try:
        async with asyncio.timeout(stall_s):
            await writer.drain()
    except TimeoutError:
        raise Stalled(f"the client has read nothing for {stall_s:g} s") from None
