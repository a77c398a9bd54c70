"""Clients of every temper on one event loop: steady readers, slow readers, ones that leave, ones that want it whole. Knows HTTP, no engine.

One loop for all of them, because a thread each would take from the server the very cores that it is measured on.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

SMALL_BUFFER_BYTES = 4_096         # of a slow reader's socket
PATIENCE_S = 90.0                  # without a byte: then it is an error


class Temper(StrEnum):
    STEADY = "steady"              # streams, one prompt after the other
    SLOW = "slow"                  # streams, and sleeps between chunks
    LEAVER = "leaver"              # streams, and disconnects somewhere
    WHOLE = "whole"                # generate, without streaming


@dataclass(frozen=True)
class Want:
    """How a temper asks."""

    tokens: int
    pause_s: float = 0.0           # between chunks


WANTS = {Temper.STEADY: Want(64), Temper.SLOW: Want(192, 0.15), Temper.LEAVER: Want(192), Temper.WHOLE: Want(64)}


@dataclass
class Heard:
    """One request as its client saw it; times are of time.perf_counter()."""

    request_id: str
    temper: Temper
    stream: int                    # which client
    sent_at: float
    chunk_at: list[float] = field(default_factory=list)
    tokens: int = 0                # told with the last chunk
    ended_at: float = 0.0
    left: bool = False             # by our own will
    error: str = ""

    @property
    def is_whole(self) -> bool:
        return not self.left and not self.error


class Connection:
    """To one address; opened again when the server has closed it, or we have."""

    def __init__(self, url: str, *, small: bool) -> None:
        parts = urlsplit(url)
        self._host, self._port, self._small = str(parts.hostname), int(parts.port or 80), small
        self._writer: asyncio.StreamWriter | None = None

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, int | None]:
        """Status, and the body's length: None when it comes in chunks."""
        if self._writer is None or self._writer.is_closing() or self._reader.at_eof():
            await self._open()
        assert self._writer is not None
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        self._writer.write(head.encode() + data)
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
        length = next((int(line.partition(":")[2]) for line in lines if line.startswith("content-length:")), None)
        return int(lines[0].split()[1]), length

    async def body(self, length: int | None) -> bytes:
        if length is not None:
            return await self._reader.readexactly(length)
        body = b""
        while piece := await self.chunk():
            body += piece
        return body

    async def chunk(self) -> bytes:
        """One of HTTP's chunks; b"" is the last."""
        size = int(await self._reader.readuntil(b"\r\n"), 16)
        return (await self._reader.readexactly(size + 2))[:size]

    def leave(self, *, rudely: bool = False) -> None:
        """Rudely: with a reset instead of an end."""
        if self._writer is not None:
            if rudely:
                sock = self._writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._writer.transport.abort()
            self._writer = None

    async def _open(self) -> None:
        self.leave()
        sock = socket.socket()
        sock.setblocking(False)
        if self._small:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER_BYTES)
        try:
            await asyncio.get_running_loop().sock_connect(sock, (self._host, self._port))
            self._reader, self._writer = await asyncio.open_connection(sock=sock, limit=SMALL_BUFFER_BYTES if self._small else 2**16)
        except BaseException:                              # a leaver may be in a hurry
            sock.close()
            raise


class Client:
    """Asks one prompt after the other until `until`; every request is in `heard`."""

    def __init__(self, url: str, model: str, number: int, temper: Temper, prompts: Sequence[str], seed: int = 0) -> None:
        self.heard: list[Heard] = []
        self._url, self._model, self._number, self._temper = url, model, number, temper
        self._prompts, self._random = prompts, random.Random(f"{seed}/{number}")
        self._connection = Connection(url, small=temper is Temper.SLOW)

    async def run(self, until: float) -> None:
        asked = 0
        while time.perf_counter() < until:
            prompt = self._prompts[(self._number * 7 + asked) % len(self._prompts)]
            await self.ask(prompt, f"soak-{self._number}-{asked}", until)
            asked += 1
        self.close()

    def close(self) -> None:
        self._connection.leave()

    async def ask(self, prompt: str, request_id: str, until: float = float("inf")) -> Heard:
        """One request. What goes wrong is told in `error`; a slow reader leaves when the time is up."""
        heard = Heard(request_id, self._temper, self._number, time.perf_counter())
        self.heard.append(heard)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._exchange(heard, prompt, until)
        except Exception as error:
            heard.error = heard.error or f"{type(error).__name__}: {error}"
        if not heard.is_whole:
            self._connection.leave(rudely=self._random.random() < 0.5)
        heard.ended_at = time.perf_counter()
        return heard

    async def _exchange(self, heard: Heard, prompt: str, until: float) -> None:
        streams, want = self._temper is not Temper.WHOLE, WANTS[self._temper]
        body = {"text_input": prompt, "request_id": heard.request_id, "sampling_param_max_tokens": want.tokens, "workload": "soak",
                "sampling_param_ignore_eos": True, "sampling_param_exclude_input_from_output": True, "streaming": streams}
        path = f"/v2/models/{self._model}/generate" + ("_stream" if streams else "")
        leaves_after = self._random.randrange(0, want.tokens // 2) if self._temper is Temper.LEAVER else None
        if leaves_after == 0:                              # before a single byte of the answer
            asking = asyncio.ensure_future(self._connection.post(path, body))
            await asyncio.wait([asking], timeout=self._random.uniform(0.0, 0.2))
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            heard.left = True
            return
        status, length = await self._connection.post(path, body)
        if status == 200 and streams:
            await self._listen(heard, leaves_after, want.pause_s, until)
        else:
            _read_whole(heard, status, await self._connection.body(length))

    async def _listen(self, heard: Heard, leaves_after: int | None, pause_s: float, until: float) -> None:
        events = b""
        while piece := await self._connection.chunk():
            *whole, events = (events + piece).split(b"\n\n")
            heard.chunk_at += [time.perf_counter()] * len(whole)
            for event in whole:
                _read_event(heard, event)
            if leaves_after is not None and len(heard.chunk_at) >= leaves_after:
                heard.left = True
                return
            if pause_s:
                await asyncio.sleep(pause_s)
                if time.perf_counter() > until:
                    heard.left = True
                    return
        if not heard.tokens:
            heard.error = heard.error or "the stream ended before the answer did"


def _read_event(heard: Heard, event: bytes) -> None:
    if b'"num_output_tokens"' in event:
        heard.tokens = int(json.loads(event.removeprefix(b"data:"))["num_output_tokens"])
    elif b'"text_output"' not in event:
        heard.error = event.decode(errors="replace")[:200]


def _read_whole(heard: Heard, status: int, body: bytes) -> None:
    if status == 200:
        heard.tokens = int(json.loads(body)["num_output_tokens"])
    else:
        heard.error = f"status {status}: {body.decode(errors='replace')[:200]}"


def mix(streams: int) -> list[Temper]:
    """Of 32: 20 steady, 5 slow, 4 leavers, 3 that want it whole; with few streams at least one of each."""
    others = [(Temper.SLOW, 5), (Temper.LEAVER, 4), (Temper.WHOLE, 3)]
    tempers = [temper for temper, share in others for _ in range(max(1, round(streams * share / 32)))]
    return [Temper.STEADY] * max(1, streams - len(tempers)) + tempers


async def crowd(clients: Sequence[Client], seconds: float, meanwhile: Callable[[], None], every_s: float) -> None:
    """All clients at once for so long; `meanwhile` is called in between, in a thread."""
    began = time.perf_counter()
    running = asyncio.gather(*(client.run(began + seconds) for client in clients))
    while not running.done():
        await asyncio.to_thread(meanwhile)
        await asyncio.wait([running], timeout=every_s)
    await running
