"""The front before upstream servers of every temper: passing on, limits, the process, on real sockets."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fronts import (
    GENERATE,
    PROMPT,
    STREAM,
    Gate,
    Upstream,
    ask,
    client_of,
    first_of,
    front_of,
    gone,
    run,
    saying,
    silent,
    started_stream,
    statuses,
    until,
)
from tide_pipeline.errors import PortInUse
from tide_pipeline.serve.front.relay import Limits
from tide_pipeline.serve.front.replicas import ReplicaSpec, write_replicas
from tide_pipeline.serve.front.server import Front

# --- passing on --------------------------------------------------------------------------------------------------

@run
async def test_requests_and_answers_pass_whole_on_kept_connections(folder: Path) -> None:
    async with Upstream("a") as a, front_of(folder, a) as front, client_of(front) as client:
        for _ in range(3):
            assert await client.ask(body=PROMPT, fields="X-Mine: 1\r\nConnection: X-Hop\r\nX-Hop: 2\r\n") == (200, {"from": "a"})
        assert await client.ask("/v2/models/tiny/config?x=1") == (200, {"from": "a"})
        request, body = a.requests[0]
        assert json.loads(body) == PROMPT | {"tide_received_at": json.loads(body)["tide_received_at"]}
        assert request.field("x-mine") == "1" and not request.field("x-hop") and request.path == GENERATE
        assert a.requests[3][0].path == "/v2/models/tiny/config" and a.connections == 1
        assert front.status()["served"] == 4 and front.status()["in_flight"] == 0


@run
async def test_events_are_not_held_back(folder: Path) -> None:
    gate = Gate()
    async with Upstream("a", gate) as a, front_of(folder, a) as front, client_of(front) as client:
        await started_stream(client, PROMPT)                             # the second event does not exist yet
        assert front.status()["replicas"][0]["in_flight"] == 1
        gate.open.set()
        assert await client.body(None) == b"data: 2\n\n"
        assert (await client.ask("/v2/health/live"))[0] == 200


@run
async def test_a_chunked_request_and_an_old_client_are_understood(folder: Path) -> None:
    gate = Gate()
    gate.open.set()
    async with Upstream("a", gate) as a, front_of(folder, a) as front, client_of(front) as client:
        client.writer.write(b"POST %s HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n" % STREAM.encode())
        assert (await client.head())[0] == 100
        client.writer.write(b"5\r\n{\"tex\r\n11;x=y\r\nt_input\":\"hello\"}\r\n0\r\nTrailer: x\r\n\r\n")
        assert (await client.head())[0] == 200 and await client.body(None) == b"data: 1\n\ndata: 2\n\n"
        sent = json.loads(a.requests[0][1])
        assert abs(time.time() - float(sent.pop("tide_received_at"))) < 60 and sent == {"text_input": "hello"}
        assert a.requests[0][0].length == len(a.requests[0][1])
        a.answering = saying(b"HTTP/1.0 200 OK\r\n\r\ndata: 1\n\n")
        async with client_of(front) as old:
            old.writer.write(b"POST %s HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}" % STREAM.encode())
            assert (await old.head())[2] == -1 and await old.body(-1) == b"data: 1\n\n" and a.requests[-1][0].minor == 0


@run
async def test_a_replicas_own_refusal_passes_and_says_when_to_come_back(folder: Path) -> None:
    full = b'HTTP/1.1 503 Service Unavailable\r\nContent-Length: 17\r\n\r\n{"error": "full"}'
    async with Upstream("a", saying(full)) as a, front_of(folder, a) as front, client_of(front) as client:
        await client.send(body=PROMPT)
        status, fields, length = await client.head()
        assert (status, fields["Retry-After"], await client.body(length)) == (503, "1", b'{"error": "full"}')
        assert front.status()["served"] == 1 and not front.status()["refused"]


@pytest.mark.parametrize("answering", [silent, Gate])
def test_a_client_that_leaves_closes_the_upstream_connection_at_once(tmp_path: Path, answering: Any) -> None:
    @run
    async def test(folder: Path) -> None:
        async with Upstream("a", answering() if answering is Gate else answering) as a, front_of(folder, a) as front:
            async with client_of(front) as client:
                await client.send(STREAM, PROMPT)
                await until(lambda: bool(a.requests))
                left = time.monotonic()
            await asyncio.wait_for(a.lost.wait(), 5)
            assert time.monotonic() - left < 1.0
            await until(lambda: front.status()["in_flight"] == 0)
            assert (front.status()["left"], front.status()["replicas"][0]["failed"]) == (1, 0)
    test(tmp_path)


# --- what is refused ---------------------------------------------------------------------------------------------

@run
async def test_bad_bodies_and_closed_paths_never_reach_a_replica(folder: Path) -> None:
    async with Upstream("a") as a, front_of(folder, a) as front, client_of(front) as client:
        status, said = await client.ask(body={**PROMPT, "sampling_param_max_tokens": "many"})
        assert status == 400 and "sampling_param_max_tokens must be an integer" in said["error"]
        for path in ("/v2/repository/index", "/v2/repository/models/tiny/unload", "/v2/systemsharedmemory/status", "/v2/trace/setting",
                     "/v2/cudasharedmemory/region/x/register", "/v2/models/tiny/trace/setting", "/v2/logging"):
            assert [(await ask(front, path))[0], (await ask(front, path, {}))[0]] == [403, 403]
        for path in ("/v2/models/tiny/infer", "/v2/models/tiny/versions/1/infer"):      # tensors as they are: nobody here reads those
            assert (await ask(front, path, {"inputs": []}))[0] == 404, path
        for path in ("/", "/metrics", "/v2/%72epository/index", "//v2/repository/index", "/v2/models/../repository/index", "/v2/x/y", "*"):
            assert (await client.ask(path))[0] == 404, path
        assert (await client.ask("http://x/v2/repository/index"))[0] == 403
        assert (await client.ask(GENERATE))[0] == 405 and (await ask(front, "/v2/models/tiny", {}))[0] == 405
        assert not a.requests and front.status()["refused"]["403"] == 15


@run
async def test_limits(folder: Path) -> None:
    async with Upstream("a") as a, front_of(folder, a, head_bytes=500, body_bytes=1000, head_s=0.3, body_s=0.3, connections=3) as front:
        assert (await ask(front, body=b"x" * 1001))[0] == 413
        assert (await ask(front, body=b" " * 200_000))[0] == 413         # more than any socket buffers
        async with client_of(front) as client:
            client.writer.write(b"POST %s HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nfffffff\r\nxxx" % GENERATE.encode())
            client.writer.write(b"x" * 5_000)
            assert (await client.head())[0] == 413
        assert (await ask(front, "/v2", fields=f"X-Long: {'x' * 2_000}\r\n"))[0] == 431
        for half in (b"GET /v2 HTTP/1.1\r\nHo", b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{" % GENERATE.encode()):
            async with client_of(front) as client:
                client.writer.write(half)
                assert (await client.head())[0] == 408
        await until(lambda: front.status()["connections"] == 0)
        async with client_of(front) as one, client_of(front) as two, client_of(front) as three, client_of(front) as four:
            for client in (one, two, three):
                assert (await client.ask("/v2"))[0] == 200
            await four.send("/v2")
            status, fields, _ = await four.head()
            assert (status, fields["Retry-After"], fields["Connection"]) == (503, "1", "close")
        await until(lambda: front.status()["connections"] == 0)
        assert (await ask(front, "/v2"))[0] == 200


@run
async def test_a_client_that_does_not_read_is_cut(folder: Path) -> None:
    async def flood(upstream: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 50000000\r\n\r\n" + b"x" * 50_000_000)
        await first_of(writer.drain(), gone(upstream, reader))

    async with Upstream("a", flood) as a, front_of(folder, a, stall_s=0.3) as front, client_of(front) as client:
        await client.send(body=PROMPT)
        await until(lambda: front.status()["left"] == 1)
        assert front.status()["in_flight"] == 0 and front.status()["replicas"][0]["failed"] == 0


@run
async def test_a_long_answer_reaches_a_slow_client_whole(folder: Path) -> None:
    chunk = bytes(range(256)) * 200

    async def long(upstream: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(200):
            writer.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    async with Upstream("a", long) as a, front_of(folder, a) as front, client_of(front) as client:
        await client.send(body=PROMPT)
        await asyncio.sleep(0.3)
        assert (await client.head())[0] == 200 and await client.body(None) == chunk * 200
        assert (await client.ask("/v2/health/live"))[0] == 200 and a.connections == 1


def test_no_prompt_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    @run
    async def test(folder: Path) -> None:
        async with Upstream("a", saying(b"xyzzy")) as a, front_of(folder, a) as front:
            assert [(await ask(front, body=body))[0] for body in (PROMPT, {"text_input": ["xyzzy", 5]}, b'{"xyzzy')] == [502, 400, 400]
            assert (await ask(front, "/xyzzy"))[0] == 404
    test(tmp_path)
    assert "did not answer" in caplog.text and "xyzzy" not in caplog.text


# --- the process -------------------------------------------------------------------------------------------------

@run
async def test_a_stop_lets_requests_in_flight_end(folder: Path) -> None:
    gate = Gate()
    async with Upstream("a", gate) as a, front_of(folder, a) as front, client_of(front) as client:
        await started_stream(client, PROMPT)
        stopping = asyncio.ensure_future(front.stop())
        await asyncio.sleep(0.05)
        with pytest.raises(OSError):
            await ask(front, "/v2")
        gate.open.set()
        assert await client.body(None) == b"data: 2\n\n"
        await asyncio.wait_for(stopping, 5)


def test_the_process_tells_where_it_listens_and_stops_on_sigterm(tmp_path: Path) -> None:
    write_replicas(tmp_path / "replicas.json", [ReplicaSpec("a", "http://127.0.0.1:9")])
    command = [sys.executable, "-m", "tide_pipeline.serve.front", "--replicas", str(tmp_path / "replicas.json"), "--state-file",
               str(tmp_path / "front.json"), "--body-bytes", "100"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        gives_up = time.monotonic() + 60
        while not (tmp_path / "front.json").exists():
            assert time.monotonic() < gives_up and process.poll() is None
            time.sleep(0.05)
        told = json.loads((tmp_path / "front.json").read_text())
        number = told["url"].rpartition(":")[2]
        assert told["pid"] == process.pid and statuses(int(number), b"GET /v2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n") == [503]
        taken = subprocess.run([*command, "--port", number], capture_output=True, text=True, timeout=60)
        assert taken.returncode == 2 and "give --port a free one" in taken.stderr
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(10) == 0 and json.loads((tmp_path / "front.json").read_text())["state"] == "stopped"
    finally:
        process.kill()
        process.communicate()


@run
async def test_a_port_in_use_is_named(folder: Path) -> None:
    async with Upstream("a") as a:
        with pytest.raises(PortInUse, match=str(a.port)):
            await Front(folder / "replicas.json", Limits()).start(port=a.port)
