"""HTTP client of the Triton model, on the standard library alone. Knows the wire; knows no engine.

    client = TritonClient("http://127.0.0.1:8000", "pocket")
    with client.stream(request) as pieces:
        for text in pieces: ...
    pieces.result
"""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from tide_pipeline.contracts import GenerationRequest
from tide_pipeline.errors import EngineClosed, InvalidRequest, QueueFull, StackError, TideError

SLACK_S = 10.0                     # beyond the request's own deadline, before the connection is given up

KINDS: dict[str, type[TideError]] = {"INVALID_ARG": InvalidRequest, "UNAVAILABLE": EngineClosed, "CANCELLED": StackError,
                                     "INTERNAL": StackError}


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A whole answer. `ttft_s` is the time to the first text; without streaming that is the end."""

    text: str
    num_output_tokens: int
    drafted: int
    accepted: int
    verify_steps: int
    target_steps: int
    draft_version: str
    finish_reason: str
    seconds: float
    ttft_s: float


class TritonClient:
    """Thread-safe: every call has its own connection. Raises InvalidRequest, QueueFull, EngineClosed and StackError."""

    def __init__(self, url: str, model: str, metrics_url: str = "") -> None:
        self.url, self.model, self.metrics_url = url.rstrip("/"), model, metrics_url

    def generate(self, request: GenerationRequest) -> GenerationResult:
        """The whole answer in one response."""
        began = time.perf_counter()
        with _connect(self.url, request.deadline_s + SLACK_S) as connection:
            status, body = _exchange(connection, "POST", f"/v2/models/{self.model}/generate", encode_request(request, streaming=False))
        outputs = _decode(status, body)
        seconds = time.perf_counter() - began
        return decode_result(outputs, seconds, seconds)

    def stream(self, request: GenerationRequest) -> GenerationStream:
        """The answer step by step. Leaving the `with` block early disconnects, and the server frees the slot."""
        return GenerationStream(self.url, self.model, request)

    def cancel(self, request_id: str) -> None:
        """Cancel a running request. Raises InvalidRequest when there is none of that id."""
        body = {"text_input": "", "stop": True, "request_id": request_id}
        with _connect(self.url, SLACK_S) as connection:
            status, answer = _exchange(connection, "POST", f"/v2/models/{self.model}/generate", body)
        if "CANCELLED" not in answer:
            _decode(status, answer)

    def ready(self) -> bool:
        """Whether the server is up and the model loaded."""
        try:
            with _connect(self.url, 5.0) as connection:
                return _exchange(connection, "GET", f"/v2/models/{self.model}/ready")[0] == 200
        except StackError:
            return False

    def metrics(self) -> dict[str, float]:
        """Every series of the metrics endpoint, as `name{label="value",...}`."""
        parts = urlsplit(self.metrics_url)
        with _connect(self.metrics_url, 5.0) as connection:
            return parse_metrics(_exchange(connection, "GET", parts.path or "/metrics")[1])


class GenerationStream:
    """Iterate for pieces of text, one per engine step (some are empty); then `result` is there."""

    def __init__(self, url: str, model: str, request: GenerationRequest) -> None:
        self.result: GenerationResult | None = None
        self._began = time.perf_counter()
        self._connection = _open(url, request.deadline_s + SLACK_S)
        with _as_stack_error(url):
            self._connection.request("POST", f"/v2/models/{model}/generate_stream", json.dumps(encode_request(request, streaming=True)),
                                     {"Content-Type": "application/json"})
            self._response = self._connection.getresponse()
        self._url = url

    def __enter__(self) -> GenerationStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        told, ttft_s = "", 0.0
        for event in self._events():
            text = event["text_output"]
            ttft_s = ttft_s or time.perf_counter() - self._began
            yield text[len(told):]
            told = text
            if "num_output_tokens" in event:
                self.result = decode_result(event, time.perf_counter() - self._began, ttft_s)
        self.close()
        if self.result is None:
            raise StackError(f"Triton at {self._url} ended the stream before the answer did: see its log")

    def close(self) -> None:
        """Disconnect."""
        self._response.close()
        self._connection.close()

    def _events(self) -> Iterator[dict[str, Any]]:
        """Server-sent events; an error is one of them, or the whole body."""
        with _as_stack_error(self._url):
            for line in self._response:
                payload = line.removeprefix(b"data:").strip()
                if payload:
                    yield _decode(self._response.status, payload.decode())


def encode_request(request: GenerationRequest, *, streaming: bool) -> dict[str, Any]:
    """The JSON body; all counters and the finish reason are asked for, the prompt is not echoed."""
    how = request.sampling
    body: dict[str, Any] = {
        "text_input": request.prompt, "streaming": streaming, "sampling_param_max_tokens": how.max_tokens,
        "sampling_param_temperature": how.temperature, "sampling_param_top_k": how.top_k, "sampling_param_top_p": how.top_p,
        "sampling_param_seed": how.seed % 2**64, "sampling_param_ignore_eos": how.ignore_eos,
        "sampling_param_exclude_input_from_output": True, "return_finish_reason": True, "speculation": request.speculation,
        "workload": request.workload, "tenant": request.tenant, "request_id": request.request_id, "deadline_s": request.deadline_s}
    return body | ({"sampling_param_stop": list(how.stop)} if how.stop else {})


def decode_result(outputs: dict[str, Any], seconds: float, ttft_s: float) -> GenerationResult:
    """Raises StackError when an output is missing: the model is not ours."""
    try:
        return GenerationResult(
            outputs["text_output"], int(outputs["num_output_tokens"]), int(outputs["total_draft_tokens"]),
            int(outputs["total_accepted_draft_tokens"]), int(outputs["verify_steps"]), int(outputs["target_steps"]),
            outputs["draft_version"], outputs["finish_reason"], seconds, ttft_s)
    except KeyError as error:
        raise StackError(f"the answer lacks {error}: is this model served by tide?") from error


def parse_metrics(text: str) -> dict[str, float]:
    """Prometheus text format, without timestamps."""
    lines = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


def _decode(status: int, body: str) -> dict[str, Any]:
    """An answer, or the error it stands for: Triton 2.51 says 400 to all errors of a model's own, so their kind leads the message."""
    try:
        outputs: dict[str, Any] = json.loads(body)
    except json.JSONDecodeError as error:
        raise StackError(f"Triton answered {status} with something that is not JSON: {body[:200]!r}") from error
    if "error" not in outputs and status == 200:
        return outputs
    kind, _, message = str(outputs.get("error", body)).partition(": ")
    if kind in KINDS:
        raise KINDS[kind](message)
    text = str(outputs.get("error", body))
    if status == 503:
        raise QueueFull(text) if "queue" in text else EngineClosed(text)
    raise InvalidRequest(text) if status == 400 else StackError(f"Triton answered {status}: {text}")


def _open(url: str, timeout_s: float) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    return http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port or 80, timeout=timeout_s)


@contextlib.contextmanager
def _connect(url: str, timeout_s: float) -> Iterator[http.client.HTTPConnection]:
    with _as_stack_error(url), contextlib.closing(_open(url, timeout_s)) as connection:
        yield connection


@contextlib.contextmanager
def _as_stack_error(url: str) -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise StackError(f"Triton at {url} did not answer in time: see its log") from error
    except (OSError, http.client.HTTPException) as error:
        raise StackError(f"no Triton answers at {url} ({type(error).__name__}: {error}): start it with `tide up`") from error


def _exchange(connection: http.client.HTTPConnection, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
    connection.request(method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, response.read().decode()
