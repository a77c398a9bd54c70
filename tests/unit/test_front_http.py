"""Malformed HTTP before the front: refused, never a crash, never a 5xx."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fronts import (
    GENERATE,
    Upstream,
    front_of,
    statuses,
)
from tide_pipeline.serve.front.http import Garbled
from tide_pipeline.serve.front.wire import Body


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A front on a thread of its own, impatient, before a replica that says 200."""
    ready, ports, ending = threading.Event(), [], []

    async def serve() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        ending.append(lambda: loop.call_soon_threadsafe(stop.set))
        async with Upstream("a") as a, front_of(tmp_path_factory.mktemp("front"), a, head_s=0.1, body_s=0.1, idle_s=0.1) as front:
            ports.append(int(front.url.rpartition(":")[2]))
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(20)
    yield ports[0]
    ending[0]()
    thread.join()


lines = st.sampled_from([b"POST %s HTTP/1.1" % GENERATE.encode(), b"GET /v2 HTTP/1.1", b"GET /v2/health/ready HTTP/1.0",
                         b"HEAD /v2 HTTP/1.1", b"Host: x", b"Content-Length: 2",
                         b"Content-Length: -2", b"Content-Length: 2, 2", b"Transfer-Encoding: chunked",
                         b"Transfer-Encoding: gzip", b" folded", b"Connection: close", b"Expect: 100-continue", b"{}", b"0", b"2", b"",
                         b"Host : x",
                         b"\x00", b"\xff: \xff", b"OPTIONS * HTTP/1.1", b"GET /v2 HTTP/2.0", b"PRI * HTTP/2.0", b"fffffffff", b"2;x=\n"])
nearly_http = st.lists(lines | st.binary(max_size=8), max_size=9).map(b"\r\n".join)


@given(st.binary(max_size=200) | nearly_http | nearly_http.map(lambda data: data + b"\r\n\r\n"))
def test_malformed_http_is_a_4xx_or_nothing(port: int, data: bytes) -> None:
    assert all(status < 500 for status in statuses(port, data))
    assert statuses(port, b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n") == [200]


@pytest.mark.parametrize("data", [
    b"GET /v2 HTTP/1.1\r\n\r\n", b"GET /v2 HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", b"GET /v2 HTTP/1.1\nHost: x\n\nGET / HTTP/1.1\r\n\r\n",
    b"POST /v2 HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /v2 HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n", b"GET /v2 HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n",
    b"POST /v2 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, identity\r\n\r\n", b"GET  /v2 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /v2 HTTP/1.1\r\nHost: x\r\nA : b\r\n\r\n", b"GET /v2 HTTP/1.1\r\nHost: x\rA: b\r\n\r\n",
    b"POST /v2 HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n"])
def test_what_two_readers_could_read_in_two_ways_is_refused(port: int, data: bytes) -> None:
    assert statuses(port, data) == [400]


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=5), st.lists(st.integers(1, 30), min_size=1), st.binary(max_size=10))
def test_the_end_of_a_chunked_body_is_found_however_it_arrives(chunks: list[bytes], cuts: list[int], next_answer: bytes) -> None:
    sent = b"".join(b"%X;a=b\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\nTrailer: x\r\n\r\n"
    body, at, sizes = Body(None), 0, itertools.cycle(cuts)
    data = sent + next_answer
    while not body.ended:
        at += body.feed(data[at:at + next(sizes)])
    assert at == len(sent) and body.feed(next_answer) == 0


@given(st.binary(max_size=80), st.none() | st.integers(0, 60))
def test_no_bytes_make_a_body_longer_than_it_is(data: bytes, length: int | None) -> None:
    body = Body(length)
    try:
        taken = body.feed(data)
    except Garbled:
        assert length is None
    else:
        assert taken <= len(data) and (length is None or (taken == min(length, len(data)) and body.ended == (taken == length)))
