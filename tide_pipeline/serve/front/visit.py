"""One client's connection: its requests read, judged, passed on or answered. Knows paths and limits; logs nothing of what it reads.

Only what is listed here goes through; repository control, shared memory, trace and logging are answered 403.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from tide_pipeline.errors import InvalidRequest, TideError
from tide_pipeline.serve.front.check import check_generate
from tide_pipeline.serve.front.http import ClientReader, Garbled, Refused, Request, answer, linger, parse_request, read_body
from tide_pipeline.serve.front.relay import RETRY, Job, Relay

log = logging.getLogger(__name__)

NAME = r"[A-Za-z0-9_-][A-Za-z0-9_.-]*"
MODEL = rf"/v2/models/{NAME}(?:/versions/[0-9]+)?"
OWN = re.compile(r"/front/status|/v2/health/live|/v2/health/ready")
READS = re.compile(rf"/v2|/v2/models/stats|{MODEL}(?:/ready|/config|/stats)?")
RUNS = re.compile(rf"{MODEL}/(generate|generate_stream)")
CLOSED = re.compile(r"/v2/(?:repository|systemsharedmemory|cudasharedmemory|trace|logging)(?:/.*)?|/v2/models/.*/trace/setting")


class Visit:
    """`await run()` ends when the client has left, broke the rules, or was idle for too long."""

    def __init__(self, reader: ClientReader, writer: asyncio.StreamWriter, relay: Relay, status: Callable[[], dict[str, Any]]) -> None:
        self._reader, self._writer, self._relay, self._status = reader, writer, relay, status
        self._limits = relay.limits
        self._request: Request | None = None
        self._is_unread = False        # bytes of this request may still come: its connection can't be used again

    async def run(self, *, is_too_many: bool) -> None:
        """Swallows and counts what a client can cause."""
        try:
            if is_too_many:
                self._is_unread = True
                await self._refuse(Refused(503, f"more than {self._limits.connections} connections: try again soon", RETRY))
            else:
                while await self._turn():
                    pass
        except asyncio.CancelledError:                     # the client has left, or the front stops
            self._writer.transport.abort()
        except (OSError, TimeoutError, TideError):         # too late for an answer
            self._writer.transport.abort()
        except Exception as error:                         # its text could quote the request
            log.error("a connection failed with %s at line %s", type(error).__name__, _line(error))
            self._writer.transport.abort()
        finally:
            self._writer.close()

    async def _turn(self) -> bool:
        """One request and its answer. False when the connection is to be closed."""
        self._request, self._is_unread = None, True
        try:
            self._request = request = await self._read_head()
            if request is None:
                return False
            self._is_unread = request.length != 0
            if OWN.fullmatch(request.path):
                return await self._answer_own(request)
            return await self._relay.pass_on(await self._admit(request), self._reader, self._writer)
        except (Garbled, InvalidRequest) as error:
            return await self._refuse(Refused(400, str(error)))
        except Refused as error:
            return await self._refuse(error)

    async def _read_head(self) -> Request | None:
        """None when the client has left, or was idle for too long."""
        try:
            async with asyncio.timeout(self._limits.idle_s):
                first = await self._reader.read(1)
        except TimeoutError:
            return None
        if not first:
            return None
        try:
            async with asyncio.timeout(self._limits.head_s):
                return parse_request(first + await self._reader.readuntil(b"\r\n\r\n"))
        except TimeoutError:
            raise Refused(408, f"the request's head took more than {self._limits.head_s:g} s") from None
        except asyncio.LimitOverrunError:
            raise Refused(431, f"the request's head is longer than {self._limits.head_bytes} bytes") from None
        except asyncio.IncompleteReadError:
            raise Garbled("the request ended within its head") from None

    async def _admit(self, request: Request) -> Job:
        """Raises Refused, InvalidRequest, Garbled."""
        runs = RUNS.fullmatch(request.path)
        if CLOSED.fullmatch(request.path):
            raise Refused(403, "this endpoint is closed")
        if runs is None and READS.fullmatch(request.path) is None:
            raise Refused(404, "no such endpoint: see the first lines of tide_pipeline/serve/front/__init__.py")
        _allow(request, "POST" if runs else "GET")
        body = await self._read_body(request)
        if runs is None:
            return Job(request)
        checked = check_generate(body, streams=runs[1] == "generate_stream", received_at=time.time())
        return Job(request, checked.body, checked.request_id, checked.deadline_s)

    async def _read_body(self, request: Request) -> bytes:
        if request.field("expect").lower() == "100-continue" and (request.length or 0) <= self._limits.body_bytes:
            self._writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            async with asyncio.timeout(self._limits.body_s):
                body = await read_body(self._reader, request.length, self._limits.body_bytes)
        except TimeoutError:
            raise Refused(408, f"the request's body took more than {self._limits.body_s:g} s") from None
        self._is_unread = False
        return body

    async def _answer_own(self, request: Request) -> bool:
        _allow(request, "GET")
        if request.path == "/front/status":
            return await self._answer(200, self._status(), {})
        is_ready = request.path == "/v2/health/live" or self._relay.fleet.ready()
        return await (self._answer(200, None, {}) if is_ready else self._refuse(Refused(503, "no replica takes requests", RETRY)))

    async def _refuse(self, refused: Refused) -> bool:
        self._relay.counts[str(refused.status)] += 1
        return await self._answer(refused.status, {"error": str(refused)}, refused.fields)

    async def _answer(self, status: int, value: object, fields: Mapping[str, str]) -> bool:
        request = self._request
        keeps_alive = request is not None and request.keeps_alive and not self._is_unread and not self._relay.stopping
        with_body = request is None or request.method != "HEAD"
        self._writer.write(answer(status, value, fields, with_body=with_body, keeps_alive=keeps_alive))
        async with asyncio.timeout(self._limits.stall_s):
            await self._writer.drain()
        if self._is_unread:
            await linger(self._reader, self._writer)
        return keeps_alive


def _allow(request: Request, method: str) -> None:
    if request.method != method:
        raise Refused(405, f"{request.path} takes {method} alone", {"Allow": method})


def _line(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}" if trace is not None else "?"
