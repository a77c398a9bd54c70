"""The soak's clients against a real front before a small upstream, its sums, and its picture. Nothing here is timed."""

from __future__ import annotations

import asyncio
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import flame
import pytest
from soak import added, fairness
from soak_clients import Client, Heard, Temper, mix

from tests.fronts import Upstream, front_of, run


def event(text: str, **more: str) -> bytes:
    return b"data: " + json.dumps({"text_output": text, **more}).encode() + b"\n\n"


async def answering(upstream: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> None:
    """As Triton: events in chunks, two of them in one and one of them in two; a prompt "refuse" is refused, "cut" is cut short."""
    asked = json.loads(body)
    if asked["text_input"] == "refuse":
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 15\r\n\r\n{\"error\": \"no\"}")
        return
    if not asked["streaming"]:
        whole = json.dumps({"text_output": "abc", "num_output_tokens": "3"}).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(whole), whole))
        return
    last = event('says "num_output_tokens"', num_output_tokens="3")
    pieces = [event("a") + event("ab"), last[:9], last[9:]] if asked["text_input"] != "cut" else [event("a")]
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for piece in pieces:
        writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
    writer.write(b"0\r\n\r\n")


@run
async def test_clients_hear_what_was_said_and_errors_are_errors(folder: Path) -> None:
    async with Upstream("a", answering) as a, front_of(folder, a) as front:
        for temper, chunks in ((Temper.STEADY, 3), (Temper.SLOW, 3), (Temper.WHOLE, 0)):
            client = Client(front.url, "tiny", 0, temper, ["x"])
            for name in "ab":                                  # on one connection
                heard = await client.ask("x", name)
                assert (heard.error, heard.tokens, len(heard.chunk_at), heard.is_whole) == ("", 3, chunks, True)
            assert "status 400" in (await client.ask("refuse", "c")).error and not client.heard[-1].is_whole
            assert (await client.ask("x", "d")).tokens == 3, "it goes on after an error"
            client.close()
        assert "ended before the answer" in (await Client(front.url, "tiny", 0, Temper.STEADY, []).ask("cut", "e")).error


@run
async def test_a_leaver_leaves_and_that_is_no_error(folder: Path) -> None:
    async with Upstream("a", answering) as a, front_of(folder, a) as front:
        clients = [Client(front.url, "tiny", i, Temper.LEAVER, []) for i in range(40)]
        heard = [await client.ask("x", "r") for client in clients]
        for client in clients:
            client.close()
    assert not any(h.error for h in heard) and {h.left for h in heard} == {True, False}


def test_every_temper_is_there() -> None:
    assert [mix(32).count(temper) for temper in Temper] == [20, 5, 4, 3]
    assert set(mix(4)) == set(Temper) and len(mix(4)) == 4


def told(chunk_at: list[float], tokens: int, request_id: str = "a", **fields: object) -> Heard:
    return Heard(request_id, Temper.STEADY, 0, 0.0, chunk_at, tokens, **fields)            # type: ignore[arg-type]


def test_added_time_is_the_clients_less_the_steps() -> None:
    heard = [told([1.0, 1.1, 1.3], 7), told([1.0], 1, "left", left=True), told([1.0, 2.0], 2, "not in the log")]
    found = added(heard, {"a": (240.0, 2), "left": (1.0, 1)})
    assert (found["requests"], found["client_ms_per_token"], found["step_ms_per_token"]) == (1, 50.0, 40.0)
    assert found["added_ms_per_token"]["median"] == 10.0 and found["chunks_per_step"] == 1.0
    assert added([], {}) == {"requests": 0}


def test_fairness_is_of_steady_clients() -> None:
    clients = [Client("http://x:1", "m", i, Temper.STEADY, []) for i in range(2)]
    clients[0].heard, clients[1].heard = [told([], 30)], [told([], 60), told([], 30)]
    assert fairness(clients) == {"streams": 2, "min_tokens": 30, "median_tokens": 60, "max_tokens": 90, "jain_index": pytest.approx(0.8)}


FOLDED = """thread (0x7F01): tide-engine;Thread.run (threading.py:982);EmbeddedEngine._decode (tide_pipeline/engine/embedded.py:12) 30
thread (0x7F01): tide-engine;Thread.run (threading.py:982);EmbeddedEngine._decode (/somewhere/of/mine/embedded.py:12);f (a<b>) 10
thread (0x7F02): tide-watcher;Event.wait (threading.py:629) 500
thread (25522): MainThread 60
"""


def test_a_flame_graph_leaves_waits_and_machine_paths_out() -> None:
    root = flame.read(FOLDED.splitlines())
    assert root.samples == 40 and list(root.below) == ["tide-engine"]
    picture = flame.draw(root, "a & b")
    titles = [title.text or "" for title in ET.fromstring(picture).iter("{http://www.w3.org/2000/svg}title")]
    assert titles[2] == "75.0% EmbeddedEngine._decode (tide_pipeline/engine/embedded.py)" and titles[-1] == "25.0% f (a<b>)"
    assert "/somewhere" not in picture and "threading.py" not in picture
