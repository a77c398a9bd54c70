"""Several replicas behind the front: whose turn it is, drain, readiness, and the file that tells it all."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fronts import (
    PROMPT,
    Gate,
    Upstream,
    ask,
    client_of,
    front_of,
    plain,
    run,
    saying,
    silent,
    started_stream,
    until,
)
from tide_pipeline.errors import SettingsError
from tide_pipeline.serve.front.http import Garbled
from tide_pipeline.serve.front.replicas import read_replicas, write_replicas


@run
async def test_a_drained_replica_ends_what_it_has_and_comes_back(folder: Path) -> None:
    gate = Gate()
    async with Upstream("a", gate) as a, Upstream("b") as b, front_of(folder, a) as front, client_of(front) as client:
        await started_stream(client, PROMPT)
        write_replicas(folder / "replicas.json", [replace(a.spec, drain=True), b.spec])
        await until(lambda: len(front.status()["replicas"]) == 2 and front.fleet.replicas["b"].ready)
        for _ in range(4):
            assert await ask(front, body=PROMPT) == (200, {"from": "b"})
        told = front.status()["replicas"][0]
        assert (told["drain"], told["in_flight"], told["ready"]) == (True, 1, True)
        gate.open.set()
        assert await client.body(None) == b"data: 2\n\n"
        await until(lambda: front.status()["replicas"][0]["in_flight"] == 0)
        write_replicas(folder / "replicas.json", [a.spec, replace(b.spec, weight=0.0)])
        await until(lambda: front.fleet.replicas["a"].takes_requests and not front.fleet.replicas["b"].takes_requests)
        a.answering = plain
        assert await ask(front, body=PROMPT) == (200, {"from": "a"})


@run
async def test_the_least_busy_takes_the_next_and_equals_share_by_weight(folder: Path) -> None:
    async with Upstream("a") as a, Upstream("b") as b, front_of(folder, a, b) as front, contextlib.AsyncExitStack() as clients:
        front.fleet._take([a.spec, replace(b.spec, weight=3.0)])
        for _ in range(40):
            await ask(front, body=PROMPT)
        assert (len(a.requests), len(b.requests)) == (10, 30)
        a.answering = b.answering = gate = Gate()
        for _ in range(8):
            await started_stream(await clients.enter_async_context(client_of(front)), PROMPT)
        assert [replica.in_flight for replica in front.fleet.replicas.values()] == [2, 6]
        gate.open.set()


@run
async def test_a_refused_connection_goes_to_another_replica(folder: Path) -> None:
    async with Upstream("a") as a, Upstream("b") as b, front_of(folder, a, b) as front:
        front._watch.cancel()                                            # nobody tells it but the refused connection
        a._server.close()
        assert [await ask(front, body=PROMPT) for _ in range(4)] == [(200, {"from": "b"})] * 4
        assert not front.fleet.replicas["a"].ready and front.status()["replicas"][0]["failed"] == 0
        b._server.close()
        front.fleet.replicas["b"].close_idle()
        assert (await ask(front, body=PROMPT))[0] == 503
        assert (await ask(front, "/v2/health/ready"))[0] == 503


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 200 OK\r\nContent", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"])
def test_what_was_sent_once_is_not_sent_again(tmp_path: Path, data: bytes) -> None:
    @run
    async def test(folder: Path) -> None:
        async with Upstream("a", saying(data)) as a, Upstream("b", saying(data)) as b, front_of(folder, a, b) as front:
            async with client_of(front) as client:
                status, said = await client.ask(body=PROMPT)
                assert status == 502 and "may have run" in said["error"] and len(a.requests) + len(b.requests) == 1
                assert (await client.ask("/v2/health/live"))[0] == 200
            assert sum(told["failed"] for told in front.status()["replicas"]) == 1
    test(tmp_path)


@run
async def test_an_answer_cut_short_is_not_taken_for_whole(folder: Path) -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
    async with Upstream("a", saying(chunked)) as a, front_of(folder, a) as front, client_of(front) as client:
        await client.send(body=PROMPT)
        assert (await client.head())[0] == 200
        with pytest.raises((Garbled, ConnectionResetError)):
            await client.body(None)
        assert (front.status()["cut"], front.status()["served"]) == (1, 0)


@run
async def test_a_replica_that_hangs_is_given_up_unless_the_request_asks_for_longer(folder: Path) -> None:
    async with Upstream("a", silent) as a, front_of(folder, a, silence_s=0.2) as front:
        status, said = await ask(front, body=PROMPT)
        assert status == 502 and "TimeoutError" in said["error"]
        async with client_of(front) as client:
            await client.send(body={**PROMPT, "deadline_s": 5})
            await asyncio.sleep(0.6)
            assert front.status()["in_flight"] == 1


@run
async def test_a_cancellation_finds_the_replica_that_runs_the_request(folder: Path) -> None:
    gates = [Gate(), Gate()]
    async with Upstream("a", gates[0]) as a, Upstream("b", gates[1]) as b, front_of(folder, a, b) as front, client_of(front) as client:
        await started_stream(client, {**PROMPT, "request_id": "r1"})
        holder = a if a.requests else b
        holder.answering = plain
        for _ in range(3):
            assert await ask(front, body={"text_input": "", "stop": True, "request_id": "r1"}) == (200, {"from": holder.name})
        for gate in gates:
            gate.open.set()


# --- readiness and the file --------------------------------------------------------------------------------------

@run
async def test_ready_follows_the_replicas(folder: Path) -> None:
    async with Upstream("a") as a, front_of(folder, a) as front:
        assert (await ask(front, "/v2/health/ready"))[0] == 200
        a.ready = False
        await until(lambda: not front.fleet.ready())
        assert (await ask(front, "/v2/health/ready"))[0] == 503 and (await ask(front, "/v2/health/live"))[0] == 200
        status, said = await ask(front, body=PROMPT)
        assert status == 503 and "no replica" in said["error"]
        a.ready = True
        await until(front.fleet.ready)
        assert (await ask(front, "/front/status"))[1]["refused"] == {"503": 2}


@run
async def test_a_wrong_file_changes_nothing_and_is_told(folder: Path) -> None:
    async with Upstream("a") as a, front_of(folder, a) as front:
        for wrong in ("{", "[]", '{"replicas": [{"name": "a"}]}', '{"replicas": [{"name": "a", "url": "http://x:1", "wait": 1}]}',
                      '{"replicas": [{"name": "a", "url": "ftp://x"}]}',
                      '{"replicas": [{"name": "a", "url": "http://x:1", "weight": -1}]}'):
            (folder / "replicas.json").write_text(wrong)
            with pytest.raises(SettingsError, match=r"replicas\.json"):
                read_replicas(folder / "replicas.json")
            front.fleet.read()
            assert front.status()["file_error"] and await ask(front, body=PROMPT) == (200, {"from": "a"})
        (folder / "replicas.json").unlink()
        front.fleet.read()
        assert "last good" in front.status()["file_error"]
        write_replicas(folder / "replicas.json", [])
        await until(lambda: not front.fleet.replicas)
        assert front.status()["file_error"] == "" and (await ask(front, body=PROMPT))[0] == 503
    with pytest.raises(SettingsError, match="one name"):
        write_replicas(folder / "replicas.json", [a.spec, a.spec])
