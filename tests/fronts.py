"""A front before small upstream servers on real sockets: what they answer is each test's own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from tide_pipeline.serve.front.http import Garbled, Request, parse_request, parse_response, read_body
from tide_pipeline.serve.front.relay import Limits
from tide_pipeline.serve.front.replicas import ReplicaSpec, write_replicas
from tide_pipeline.serve.front.server import Front

GENERATE = "/v2/models/tiny/generate"
STREAM = "/v2/models/tiny/generate_stream"
PROMPT = {"text_input": "xyzzy-secret"}
Answering = Callable[["Upstream", asyncio.StreamReader, asyncio.StreamWriter, bytes], Awaitable[None]]


async def plain(upstream: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> None:
    """Says who it is."""
    said = json.dumps({"from": upstream.name}).encode()
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(said), said))


class Upstream:
    """A replica: ready, and otherwise as `answering` says."""

    def __init__(self, name: str, answering: Answering = plain) -> None:
        self.name, self.answering = name, answering
        self.requests: list[tuple[Request, bytes]] = []
        self.connections = 0                               # that carried a request
        self.ready = True
        self.lost = asyncio.Event()                        # a connection was closed while it was asked something

    async def __aenter__(self) -> Upstream:
        self._server = await asyncio.start_server(self._client, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    @property
    def spec(self) -> ReplicaSpec:
        return ReplicaSpec(self.name, f"http://127.0.0.1:{self.port}")

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        is_new = True
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, Garbled):
            while True:
                request = parse_request(await reader.readuntil(b"\r\n\r\n"))
                if request.path == "/v2/health/ready":
                    writer.write(b"HTTP/1.1 %s\r\nContent-Length: 0\r\n\r\n" % (b"200 OK" if self.ready else b"400 Bad Request"))
                    break
                self.connections += is_new
                is_new = False
                body = await read_body(reader, request.length, 2**24)
                self.requests.append((request, body))
                await self.answering(self, reader, writer, body)
        writer.close()


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, path: str = GENERATE, body: Any = None, method: str = "", fields: str = "") -> None:
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        verb = method or ("GET" if body is None else "POST")
        length = f"Content-Length: {len(data)}\r\n" if body is not None else ""
        self.writer.write(f"{verb} {path} HTTP/1.1\r\nHost: x\r\n{length}{fields}\r\n".encode() + data)
        await self.writer.drain()

    async def head(self) -> tuple[int, dict[str, str], int | None]:
        response = parse_response(await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 10))
        return response.status, dict(response.fields), response.length

    async def body(self, length: int | None) -> bytes:
        """-1: until the connection ends."""
        return await (self.reader.read() if length == -1 else read_body(self.reader, length, 2**30))

    async def ask(self, *args: Any, **kwargs: Any) -> tuple[int, Any]:
        await self.send(*args, **kwargs)
        status, _, length = await self.head()
        body = await asyncio.wait_for(self.body(length), 10)
        return status, json.loads(body) if body else None


@contextlib.asynccontextmanager
async def front_of(folder: Path, *upstreams: Upstream, **limits: Any) -> AsyncIterator[Front]:
    front = Front(folder / "replicas.json", Limits(**limits))
    write_replicas(folder / "replicas.json", [upstream.spec for upstream in upstreams])
    await front.start()
    try:
        yield front
    finally:
        await front.stop(0.0)


@contextlib.asynccontextmanager
async def client_of(front: Front) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(front.url.rpartition(":")[2]))
    try:
        yield Client(reader, writer)
    finally:
        writer.close()


async def ask(front: Front, *args: Any, **kwargs: Any) -> tuple[int, Any]:
    """On a connection of its own."""
    async with client_of(front) as client:
        return await client.ask(*args, **kwargs)


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


Scenario = Callable[[Path], Coroutine[Any, Any, None]]


def run(test: Scenario) -> Callable[[Path], None]:
    """A test that is a coroutine."""
    def wrapped(tmp_path: Path) -> None:
        asyncio.run(asyncio.wait_for(test(tmp_path), 60))
    wrapped.__name__, wrapped.__doc__ = test.__name__, test.__doc__
    return wrapped


class Gate:
    """An upstream's answer that stops until it is opened: one event before, one after."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def __call__(self, upstream: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n")
        await first_of(self.open.wait(), gone(upstream, reader))
        writer.write(b"9\r\ndata: 2\n\n\r\n0\r\n\r\n")


async def gone(upstream: Upstream, reader: asyncio.StreamReader) -> None:
    try:
        assert await reader.read(1) == b""
    finally:
        upstream.lost.set()


async def first_of(*waits: Coroutine[Any, Any, Any]) -> None:
    _, left = await asyncio.wait([asyncio.ensure_future(wait) for wait in waits], return_when=asyncio.FIRST_COMPLETED)
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


async def silent(upstream: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> None:
    await gone(upstream, reader)


def saying(data: bytes) -> Any:
    async def answering(upstream: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> None:
        writer.write(data)
        await writer.drain()
        writer.close()
    return answering


async def started_stream(client: Client, body: dict[str, Any]) -> None:
    await client.send(STREAM, body)
    assert (await client.head())[0] == 200
    assert await client.reader.readuntil(b"\n\n\r\n") == b"9\r\ndata: 1\n\n\r\n"


def statuses(port: int, data: bytes) -> list[int]:
    """Of every answer to these bytes, until the front closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(data)
        received = b""
        while piece := client.recv(65_536):
            received += piece
    return [int(line[9:12]) for line in received.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
