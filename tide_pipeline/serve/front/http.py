"""HTTP/1.1 on asyncio streams, for the front: heads, bodies, framing. Strict, so that no two readers can differ. Knows no Triton."""

from __future__ import annotations

import asyncio
import contextlib
import http
import json
import math
import re
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

from tide_pipeline.errors import TideError

TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 the grammar's word for a name
REQUEST_LINE = re.compile(rf"({TOKEN}) ([\x21-\x7e]+) HTTP/1\.([01])")
STATUS_LINE = re.compile(r"HTTP/1\.[01] ([1-5][0-9][0-9])(?: [\t\x20-\x7e\x80-\xff]*)?")
FIELD = re.compile(rf"({TOKEN}):[ \t]*([\t\x20-\x7e\x80-\xff]*?)[ \t]*")
CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r\n")
OF_ONE_HOP = {"connection", "keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization", "te", "trailer",
              "transfer-encoding", "upgrade", "expect", "content-length"}
PIECE_BYTES = 64 * 1024
LINGER_S = 1.0                     # a client that still sends is read for so long, or it would never see why it was refused

Fields = list[tuple[str, str]]


class Refused(TideError):
    """The front answers this itself."""

    def __init__(self, status: int, message: str, fields: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.fields = status, dict(fields or {})


class Garbled(TideError):
    """Not HTTP/1.1, or not whole."""


class ClientReader(asyncio.StreamReader):
    """Calls `on_gone` as soon as the client has left, even while nobody reads."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.gone = False
        self.on_gone: Callable[[], object] = lambda: None

    def feed_eof(self) -> None:
        super().feed_eof()
        self._tell()

    def set_exception(self, exc: Exception) -> None:
        super().set_exception(exc)
        self._tell()

    def _tell(self) -> None:
        self.gone = True
        self.on_gone()


@dataclass(frozen=True)
class Request:
    """A request's head. `length`: bytes of its body, None when it comes in chunks."""

    method: str
    path: str                      # without the query: nothing behind the front reads one
    minor: int                     # of HTTP/1.x
    fields: Fields
    length: int | None

    def field(self, name: str) -> str:
        return ", ".join(value for key, value in self.fields if key.lower() == name)

    @property
    def keeps_alive(self) -> bool:
        return self.minor == 1 and "close" not in _words(self.field("connection"))


@dataclass(frozen=True)
class Response:
    """A response's head. `length`: bytes of its body, None when it comes in chunks, -1 when it ends with the connection."""

    status: int
    fields: Fields
    length: int | None
    keeps_alive: bool


def parse_request(head: bytes) -> Request:
    """`head` ends with an empty line. Raises Garbled."""
    line, fields = _split(head)
    if (match := REQUEST_LINE.fullmatch(line)) is None:
        raise Garbled("the request line is not HTTP/1.1")
    method, target, minor = match[1], match[2], int(match[3])
    if minor == 1 and sum(name.lower() == "host" for name, _ in fields) != 1:
        raise Garbled("HTTP/1.1 asks for one Host field")
    if target.lower().startswith("http://"):
        target = "/" + target[len("http://"):].partition("/")[2]
    length = _length(fields)
    if length is None and minor == 0:
        raise Garbled("HTTP/1.0 has no Transfer-Encoding")
    return Request(method, target.partition("?")[0], minor, fields, 0 if length == -1 else length)


def parse_response(head: bytes) -> Response:
    """Raises Garbled."""
    line, fields = _split(head)
    if (match := STATUS_LINE.fullmatch(line)) is None:
        raise Garbled("the status line is not HTTP/1.1")
    status, length = int(match[1]), _length(fields)
    if status < 200 or status in (204, 304):
        length = 0
    words = _words(", ".join(value for name, value in fields if name.lower() == "connection"))
    return Response(status, fields, length, length != -1 and "close" not in words and line.startswith("HTTP/1.1"))


def end_to_end(fields: Fields) -> Fields:
    """Those that are for the other end; framing is written anew."""
    named = _words(", ".join(value for name, value in fields if name.lower() == "connection"))
    return [(name, value) for name, value in fields if name.lower() not in OF_ONE_HOP and name.lower() not in named]


def render(first_line: str, fields: Fields) -> bytes:
    return "".join([first_line, "\r\n", *(f"{name}: {value}\r\n" for name, value in fields), "\r\n"]).encode("latin-1")


def status_line(status: int) -> str:
    known = status in http.HTTPStatus._value2member_map_
    return f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase if known else 'Unknown'}"


def answer(status: int, value: object, fields: Mapping[str, str], *, with_body: bool = True, keeps_alive: bool = True) -> bytes:
    """A whole answer of the front's own, in JSON; None is an empty body."""
    body = b"" if value is None else json.dumps(value).encode()
    kept = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), *fields.items()]
    return render(status_line(status), [*kept, *([] if keeps_alive else [("Connection", "close")])]) + (body if with_body else b"")


async def read_body(reader: asyncio.StreamReader, length: int | None, most: int) -> bytes:
    """Whole. Raises as `read_pieces`."""
    return b"".join([piece async for piece in read_pieces(reader, length, most)])


async def read_pieces(reader: asyncio.StreamReader, length: int | None, most: int | None = None) -> AsyncIterator[bytes]:
    """A body piece by piece, out of its chunks. Raises Garbled; Refused (413) as soon as it is said to be too long."""
    left = math.inf if most is None else most
    if (length or 0) > left:
        raise _too_long(most)
    try:
        if length is not None:
            async for piece in _exactly(reader, length):
                yield piece
        else:
            while size := await _chunk_size(reader):
                left -= size
                if left < 0:
                    raise _too_long(most)
                async for piece in _exactly(reader, size):
                    yield piece
                if await reader.readexactly(2) != b"\r\n":
                    raise Garbled("a chunk is longer than it says")
            for _ in range(100):                           # trailers are dropped
                if await reader.readuntil(b"\r\n") == b"\r\n":
                    return
            raise Garbled("too many trailers")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        raise Garbled("the body ended too early" if isinstance(error, asyncio.IncompleteReadError) else "a chunk has no size") from error


async def linger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Say that we have finished, and read on for a moment: closing at once would reset the connection under our last words."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(LINGER_S):
            writer.write_eof()
            while await reader.read(PIECE_BYTES):
                pass


async def _exactly(reader: asyncio.StreamReader, length: int) -> AsyncIterator[bytes]:
    while length:
        piece = await reader.readexactly(min(length, PIECE_BYTES))
        length -= len(piece)
        yield piece


async def _chunk_size(reader: asyncio.StreamReader) -> int:
    if (match := CHUNK.fullmatch(await reader.readuntil(b"\r\n"))) is None:
        raise Garbled("a chunk has no size")
    return int(match[1], 16)


def _too_long(most: int | None) -> Refused:
    return Refused(413, f"the body is longer than {most} bytes: send a shorter prompt")


def _split(head: bytes) -> tuple[str, Fields]:
    first, *lines = head.decode("latin-1").removeprefix("\r\n")[:-4].split("\r\n")
    fields = []
    for line in lines:
        if (match := FIELD.fullmatch(line)) is None:
            raise Garbled("a header field is not HTTP/1.1")
        fields.append((match[1], match[2]))
    return first, fields


def _length(fields: Fields) -> int | None:
    """Of the body: None is chunked, -1 is not said. Whatever could be read in two ways is refused."""
    lengths = [value for name, value in fields if name.lower() == "content-length"]
    encodings = [value.lower() for name, value in fields if name.lower() == "transfer-encoding"]
    if encodings:
        if lengths or encodings != ["chunked"]:
            raise Garbled("Transfer-Encoding must be chunked, without Content-Length")
        return None
    if len(lengths) > 1 or (lengths and re.fullmatch(r"[0-9]{1,15}", lengths[0]) is None):
        raise Garbled("Content-Length must be given once, as a number")
    return int(lengths[0]) if lengths else -1


def _words(value: str) -> set[str]:
    return {word.strip().lower() for word in value.split(",")}
