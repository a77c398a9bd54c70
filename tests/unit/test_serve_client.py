"""The HTTP client against canned bytes from a real socket: SSE, errors, metrics."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from tests.helpers import ask
from tide_pipeline.errors import EngineClosed, InvalidRequest, QueueFull, StackError, TideError
from tide_pipeline.serve.client import TritonClient, encode_request, parse_metrics

TOTALS = {"finish_reason": "length", "total_draft_tokens": "6", "total_accepted_draft_tokens": "4", "verify_steps": "2",
          "target_steps": "3", "num_output_tokens": "7", "num_prompt_tokens": "2", "draft_version": "v1"}


class Canned(HTTPServer):
    """Answers every request with the same status and body; remembers the last request's JSON."""

    status: int = 200
    body: bytes = b""
    asked: Any = None


class Handler(BaseHTTPRequestHandler):
    server: Canned

    def do_POST(self) -> None:
        self.server.asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    do_GET = lambda self: None  # noqa: E731

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[Canned]:
    with Canned(("127.0.0.1", 0), Handler) as canned:
        thread = threading.Thread(target=canned.serve_forever, args=(0.02,))
        thread.start()
        yield canned
        canned.shutdown()
        thread.join()


def client_of(server: Canned) -> TritonClient:
    return TritonClient(f"http://127.0.0.1:{server.server_port}", "tiny")


def sse(*events: dict[str, Any]) -> bytes:
    return b"".join(b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n" for event in events)


def test_generate_reads_strings_as_numbers(server: Canned) -> None:
    server.body = json.dumps({"text_output": "hé", "model_name": "tiny", **TOTALS}).encode()
    result = client_of(server).generate(ask("a", "prompt", temperature=0.5, stop=("x",), seed=-1))
    assert (result.text, result.num_output_tokens, result.drafted, result.accepted) == ("hé", 7, 6, 4)
    assert (result.verify_steps, result.target_steps, result.draft_version, result.finish_reason) == (2, 3, "v1", "length")
    assert server.asked["sampling_param_stop"] == ["x"] and server.asked["sampling_param_seed"] == 2**64 - 1
    assert server.asked["sampling_param_exclude_input_from_output"] is True and server.asked["streaming"] is False


def test_stream_turns_text_so_far_into_pieces(server: Canned) -> None:
    server.body = sse({"text_output": "a"}, {"text_output": "a"}, {"text_output": "a\n\nbé"}, {"text_output": "a\n\nbé!", **TOTALS})
    with client_of(server).stream(ask("a", "p")) as pieces:
        assert list(pieces) == ["a", "", "\n\nbé", "!"]
    assert pieces.result is not None and pieces.result.text == "a\n\nbé!" and 0 < pieces.result.ttft_s <= pieces.result.seconds


def test_a_stream_that_breaks_off_is_an_error(server: Canned) -> None:
    server.body = sse({"text_output": "a"})
    with pytest.raises(StackError, match="before the answer"), client_of(server).stream(ask("a", "p")) as pieces:
        list(pieces)


@pytest.mark.parametrize(("status", "error", "kind"), [
    (400, "INVALID_ARG: max_tokens must be at least 1", InvalidRequest), (400, "expected number of inputs", InvalidRequest),
    (400, "INTERNAL: boom", StackError), (400, "UNAVAILABLE: shutting down", EngineClosed),
    (503, "Exceeds maximum queue size", QueueFull), (503, "server is not ready", EngineClosed),
    (500, "Unable to parse 'data'", StackError)])
def test_errors_become_ours(server: Canned, status: int, error: str, kind: type[TideError]) -> None:
    server.status, server.body = status, json.dumps({"error": error}).encode()
    with pytest.raises(kind, match=error.rpartition(": ")[2]):
        client_of(server).generate(ask("a", "p"))
    server.body = sse({"error": error})
    with pytest.raises(kind), client_of(server).stream(ask("a", "p")) as pieces:
        list(pieces)


def test_nobody_there_says_what_to_do() -> None:
    with pytest.raises(StackError, match="tide up"):
        TritonClient("http://127.0.0.1:1", "tiny").generate(ask("a", "p"))
    assert not TritonClient("http://127.0.0.1:1", "tiny").ready()


def test_something_that_is_not_triton(server: Canned) -> None:
    server.body = b"<html>"
    with pytest.raises(StackError, match="not JSON"):
        client_of(server).generate(ask("a", "p"))
    server.body = b'{"text_output": "x"}'
    with pytest.raises(StackError, match="served by tide"):
        client_of(server).generate(ask("a", "p"))


def test_encoded_request_names_only_known_inputs() -> None:
    from tide_pipeline.serve.tensors import INPUTS
    assert set(encode_request(ask("a", "p", stop=("x",)), streaming=True)) <= {spec.name for spec in INPUTS}


def test_metrics_text() -> None:
    assert parse_metrics('# HELP x y\nx_total{a="b c"} 3\ny 1.5\n') == {'x_total{a="b c"}': 3.0, "y": 1.5}
