"""The front before the real Triton on a tiny engine: what it adds, and that nothing else changes."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import ask
from tests.serving import Place, cancel_while_it_streams, plain_text, poison, until, value, write_place
from tide_pipeline.deployment.record import read_observed
from tide_pipeline.errors import InvalidRequest
from tide_pipeline.serve.client import TritonClient
from tide_pipeline.serve.front.replicas import ReplicaSpec, write_replicas
from tide_pipeline.serve.request import RESERVED
from tide_pipeline.serve.tensors import INPUTS
from tide_pipeline.serve.triton import TritonReplica

SERVE = {"serve": {"max_batch": 8, "queue_size": 8, "agent_poll_s": 0.1, "report_s": 0.2}}
NAMES = [spec.name for spec in INPUTS] + sorted(RESERVED) + ["parameters", "triton_x", "other"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return write_place(tmp_path_factory.mktemp("triton"), SERVE)


@pytest.fixture(scope="module")
def replica(place: Place) -> Iterator[TritonReplica]:
    with TritonReplica(place.config, place.config_file) as running:
        yield running


@pytest.fixture(scope="module")
def front(replica: TritonReplica, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonClient]:
    """A client of the front, which is a process of its own."""
    folder = tmp_path_factory.mktemp("front")
    write_replicas(folder / "replicas.json", [ReplicaSpec("replica-0", replica.client.url)])
    process = subprocess.Popen([sys.executable, "-m", "tide_pipeline.serve.front", "--replicas", str(folder / "replicas.json"),
                                "--state-file", str(folder / "front.json")])
    try:
        gives_up = time.monotonic() + 60
        while not (folder / "front.json").exists():
            assert time.monotonic() < gives_up and process.poll() is None
            time.sleep(0.05)
        yield TritonClient(json.loads((folder / "front.json").read_text())["url"], "tiny", replica.client.metrics_url)
    finally:
        process.terminate()
        assert process.wait(30) == 0


def post(client: TritonClient, body: Any, endpoint: str = "generate", headers: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
    """Status and JSON; the answer's header fields are added to `headers`."""
    connection = http.client.HTTPConnection(client.url.removeprefix("http://"), timeout=20)
    with contextlib.closing(connection):
        connection.request("POST", f"/v2/models/tiny/{endpoint}", body if isinstance(body, bytes) else json.dumps(body))
        response = connection.getresponse()
        if headers is not None:
            headers.update(response.getheaders())
        return response.status, json.loads(response.read().decode().partition("\n")[0].removeprefix("data:") or "{}")


def finished(client: TritonClient) -> float:
    return value(client.metrics(), "tide_requests_finished_total")


@pytest.mark.parametrize(("body", "says"), [
    ({"text_input": "x", "max_tokens": "many"}, "did you mean 'sampling_param_max_tokens'"),
    ({"text_input": "x", "sampling_param_max_tokens": "many"}, "sampling_param_max_tokens must be an integer"),
    ({"text_input": 5}, "text_input must be a string"), ({"text_input": "x", "streaming": "yes"}, "streaming must be true or false"),
    ({"text_input": "x", "sampling_param_seed": -1}, "sampling_param_seed must be"), (b"{", "not valid JSON"), (b"", "empty"),
    (b"[" * 500_000, "nested too deeply"), ({}, "missing required input"), ({"text_input": ""}, "text_input is empty"),
    ({"text_input": "x" * 600}, "exceed this engine's context"), (b'{"text_input": "\xff\xfe"}', "not valid UTF-8"),
    (b'{"text_input": "\\ud800"}', "half a surrogate pair"), ({"text_input": "x", "input_ids": [1, 99_999]}, "unknown input 'input_ids'"),
    ({"text_input": "x", "sampling_param_max_tokens": 0}, "max_tokens must be at least 1"),
    ({"text_input": "x", "sampling_param_max_tokens": 2**31 - 1}, "exceed this engine's context"),
    ({"text_input": "x", "sampling_param_temperature": -0.1}, "temperature must be"),
    ({"text_input": "x", "sampling_param_temperature": 1e9}, "temperature must be"),
    ({"text_input": "x", "sampling_param_temperature": 1e39}, "a number that fits 32 bits"),
    (b'{"text_input": "x", "sampling_param_temperature": NaN}', "NaN is no JSON number"),
    ({"text_input": "x", "sampling_param_top_p": 0}, "top_p must be"), ({"text_input": "x", "sampling_param_top_k": -1}, "top_k must be"),
    ({"text_input": "x", "deadline_s": -1}, "deadline must be"), ({"text_input": "x", "request_id": "a\nb"}, "printable"),
    ({"text_input": "x", "tide_received_at": 1}, "unknown input 'tide_received_at'")])
@pytest.mark.parametrize("endpoint", ["generate", "generate_stream"])
def test_bad_input_is_400(front: TritonClient, body: Any, says: str, endpoint: str) -> None:
    status, outputs = post(front, body, endpoint)
    assert status == 400 and says in outputs["error"]
    assert front.ready()


def test_answers_are_what_triton_says(front: TritonClient, replica: TritonReplica) -> None:
    request = ask("through", "hello world", max_tokens=24, temperature=0.9, seed=5)
    direct = replica.client.generate(request)
    assert front.generate(request).text == direct.text
    with front.stream(request) as pieces:
        texts = list(pieces)
    assert len(texts) == 24 and "".join(texts) == direct.text
    with pytest.raises(InvalidRequest, match="exceed this engine's context"):
        front.generate(ask("long", "x" * 600, max_tokens=2))


@pytest.mark.parametrize("endpoint", ["generate", "generate_stream"])
def test_a_client_that_disconnects_frees_its_slot(front: TritonClient, endpoint: str) -> None:
    time.sleep(1.2)                                        # metrics are published once a second
    before = finished(front)
    body = {"text_input": "hello", "sampling_param_max_tokens": 480, "sampling_param_ignore_eos": True, "request_id": "leaver",
            "streaming": endpoint == "generate_stream"}
    connection = http.client.HTTPConnection(front.url.removeprefix("http://"), timeout=20)
    connection.request("POST", f"/v2/models/tiny/{endpoint}", json.dumps(body))
    time.sleep(0.05)
    connection.close()
    gives_up = time.monotonic() + 20
    while finished(front) < before + 1:
        assert time.monotonic() < gives_up
        time.sleep(0.1)
    assert front.generate(ask("leaver", "hello", max_tokens=2)).num_output_tokens == 2       # its id is free again


def test_a_running_request_is_cancelled_by_its_id(front: TritonClient) -> None:
    cancel_while_it_streams(front)


@pytest.mark.parametrize("endpoint", ["generate", "generate_stream"])
def test_a_request_id_in_use_is_400_and_its_owner_unaffected(place: Place, front: TritonClient, endpoint: str) -> None:
    owner = ask("twin", "hello world", max_tokens=480, ignore_eos=True)
    with front.stream(owner) as pieces:
        told = iter(pieces)
        texts = [next(told)]
        status, outputs = post(front, {"text_input": "x", "request_id": "twin"}, endpoint)
        texts += told
    assert status == 400 and "'twin' is in use by a running request" in outputs["error"]
    assert "".join(texts) == plain_text(place, owner)


def test_a_full_queue_is_503_and_the_others_get_their_answers(place: Place, front: TritonClient) -> None:
    body = {"text_input": "hello world", "sampling_param_max_tokens": 100, "sampling_param_ignore_eos": True,
            "sampling_param_exclude_input_from_output": True}
    headers: list[dict[str, str]] = [{} for _ in range(40)]
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda i: post(front, body, headers=headers[i]), range(40)))
    refused = [i for i, (status, _) in enumerate(answers) if status == 503]
    assert {status for status, _ in answers} == {200, 503} and all(headers[i]["Retry-After"] for i in refused)
    texts = {outputs["text_output"] for status, outputs in answers if status == 200}
    assert texts == {plain_text(place, ask("plain", "hello world", max_tokens=100, ignore_eos=True))}
    assert front.generate(ask("after-the-crowd", "hello", max_tokens=3)).num_output_tokens == 3


scalars = st.none() | st.booleans() | st.integers(-2**66, 2**66) | st.floats() | st.text(st.characters(), max_size=8)
values = scalars | st.lists(scalars, max_size=2) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4), scalars, max_size=2)


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from(NAMES), values, max_size=3), st.sampled_from(["generate", "generate_stream"]))
def test_no_body_makes_triton_say_5xx(front: TritonClient, body: dict[str, Any], endpoint: str) -> None:
    """Whatever the front lets pass, Triton and the model can judge."""
    status, outputs = post(front, {"text_input": "x", "sampling_param_max_tokens": 1, **body}, endpoint)
    assert status in (200, 400) and (status == 200) == ("error" not in outputs)


def test_a_draft_with_nan_never_touches_the_one_that_serves(place: Place, front: TritonClient) -> None:
    """Over the real record: refused and reported, while a request runs on the good one."""
    good, bad = place.build("v1-good"), place.build("v2-nan", seed=1)
    place.deploy({"*": good.build_id})
    until(lambda: value(front.metrics(), "tide_draft_info", "v1-good") == 1)
    poison(bad)
    place.deploy({"*": bad.build_id})
    until(lambda: value(front.metrics(), "tide_draft_agent_error") == 1)
    request = ask("on-the-good-one", "hello world", max_tokens=40, speculation="3", ignore_eos=True)
    result = front.generate(request)
    assert result.draft_version == "v1-good"
    assert result.text == plain_text(place, ask("plain", "hello world", max_tokens=40, ignore_eos=True))
    seen = read_observed(place.config.state.observed, "tiny")["replica-0"]
    assert "NaN" in seen.error and seen.drafts == {"*": good.build_id} and not value(front.metrics(), "tide_draft_info", "v2-nan")
    place.deploy({"*": good.build_id})
    until(lambda: value(front.metrics(), "tide_draft_agent_error") == 0)


def test_a_stopping_replica_does_not_wait_for_kept_connections(front: TritonClient, replica: TritonReplica) -> None:
    """Last: it stops the server."""
    assert front.generate(ask("kept", "hello", max_tokens=2)).num_output_tokens == 2
    began = time.monotonic()
    replica.stop()
    assert time.monotonic() - began < 8.0
    assert post(front, {"text_input": "x"})[0] == 503 and not front.ready()
    assert Path(replica.log).exists()
