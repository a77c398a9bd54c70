"""The real Triton server on a tiny engine: what clients see, swaps under load, restarts."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ask
from tests.serving import Place, cancel_while_it_streams, plain_text, until, value, write_place
from tide_pipeline.contracts import GenerationRequest
from tide_pipeline.deployment.record import read_observed
from tide_pipeline.errors import InvalidRequest, QueueFull
from tide_pipeline.recipes import freeze
from tide_pipeline.serve.client import GenerationResult, TritonClient
from tide_pipeline.serve.orphan import remove_stale_shared_memory
from tide_pipeline.serve.process import group_members
from tide_pipeline.serve.triton import TritonReplica

METRICS_DOC = Path(__file__).parents[2] / "docs" / "metrics.md"
SERVE = {"serve": {"max_batch": 8, "queue_size": 8, "agent_poll_s": 0.1, "report_s": 0.2}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return write_place(tmp_path_factory.mktemp("triton"), SERVE)


@pytest.fixture(scope="module")
def replica(place: Place) -> Iterator[TritonReplica]:
    """Started without a deployment record: it must be ready all the same."""
    with TritonReplica(place.config, place.config_file) as running:
        yield running


@pytest.fixture
def client(replica: TritonReplica) -> TritonClient:
    return replica.client


def post(client: TritonClient, body: Any, endpoint: str = "generate", path: str = "") -> tuple[int, dict[str, Any]]:
    """As any client would: raw JSON in, status and JSON out."""
    connection = http.client.HTTPConnection(client.url.removeprefix("http://"), timeout=20)
    with contextlib.closing(connection):
        data = body if isinstance(body, str | bytes) else json.dumps(body)
        connection.request("POST", path or f"/v2/models/{client.model}/{endpoint}", data)
        response = connection.getresponse()
        return response.status, json.loads(response.read().decode().removeprefix("data:") or "{}")


def test_ready_and_generating_without_a_record(place: Place, client: TritonClient) -> None:
    assert client.ready()
    request = ask("first", "hello world", max_tokens=24)
    result = client.generate(request)
    assert result.text == plain_text(place, request) and result.num_output_tokens == 24
    assert (result.draft_version, result.verify_steps) == ("", 0)


def test_raw_generate_looks_like_tensorrt_llms(client: TritonClient) -> None:
    status, outputs = post(client, {"text_input": "hello"})
    assert status == 200 and outputs["text_output"].startswith("hello") and outputs["num_output_tokens"] == "32"
    assert "finish_reason" not in outputs and outputs["total_draft_tokens"] == "0" and outputs["acceptance_rate"] == "0"
    status, outputs = post(client, {"text_input": "hello", "sampling_param_exclude_input_from_output": True, "return_finish_reason": True,
                                    "sampling_param_max_tokens": 5, "sampling_param_return_perf_metrics": False, "streaming": False})
    assert status == 200 and not outputs["text_output"].startswith("hello") and outputs["finish_reason"] == "length"
    assert "total_draft_tokens" not in outputs


def test_stream_sends_steps_and_ends_with_the_totals(client: TritonClient) -> None:
    request = ask("streamed", "hello world", max_tokens=24, temperature=0.9, seed=5)
    with client.stream(request) as pieces:
        texts = list(pieces)
    assert len(texts) == 24 and pieces.result is not None
    assert pieces.result.text == "".join(texts) == client.generate(request).text
    assert pieces.result.finish_reason == "length" and pieces.result.target_steps == 23


@pytest.mark.parametrize(("body", "says"), [
    ({}, "missing required input"), ({"txt_input": "hello"}, "missing required input"),
    ({"text_input": "hello", "sampling_param_max_token": 3}, "did you mean 'sampling_param_max_tokens'"),
    ({"text_input": ""}, "text_input is empty"), ({"text_input": ["a", "b"]}, "text_input must hold one element"),
    ({"text_input": "x" * 600}, "exceed this engine's context"), ({"text_input": "x", "speculation": "often"}, "speculation must be"),
    (b'{"text_input": "a\xff"}', "text_input is not valid UTF-8"),
    ({"text_input": "x", "sampling_param_max_tokens": 0}, "max_tokens must be at least 1"),
    ({"text_input": "x", "sampling_param_temperature": -1}, "temperature must be"), ({"text_input": "x", "deadline_s": 0}, "deadline"),
    ({"text_input": "x", "request_id": "gone", "stop": True}, "no request 'gone' is running")])
@pytest.mark.parametrize("endpoint", ["generate", "generate_stream"])
def test_bad_requests_are_400(client: TritonClient, body: Any, says: str, endpoint: str) -> None:
    status, outputs = post(client, body, endpoint)
    assert status == 400 and says in outputs["error"]


@pytest.mark.parametrize("body", [{"text_input": 5}, {"text_input": "x", "sampling_param_max_tokens": "many"},
                                  {"text_input": "x", "streaming": "yes"}, {"text_input": "x", "sampling_param_seed": -1}, "{", ""])
def test_wrong_types_are_refused_by_triton_itself(client: TritonClient, body: Any) -> None:
    """Triton 2.51 answers what it can't parse with 500, before any model sees it; serving goes on."""
    status, outputs = post(client, body)
    assert status in (400, 500) and ("parse" in outputs["error"])
    assert client.ready()


def test_management_endpoints_are_closed(client: TritonClient) -> None:
    for path in ("/v2/repository/index", "/v2/repository/models/tiny/unload"):
        assert post(client, {}, path=path)[0] == 403
    assert client.ready()


def test_a_full_queue_is_503_and_serving_goes_on(client: TritonClient) -> None:
    def one(i: int) -> str:
        try:
            return client.generate(ask(f"crowd-{i}", "hello world", max_tokens=450, ignore_eos=True)).finish_reason
        except QueueFull:
            return "full"

    with ThreadPoolExecutor(40) as pool:
        ended = list(pool.map(one, range(40)))
    assert ended.count("length") >= 8 and ended.count("full") >= 1 and set(ended) == {"length", "full"}
    assert client.generate(ask("after", "hello", max_tokens=3)).num_output_tokens == 3


def test_a_client_that_disconnects_frees_its_slot(client: TritonClient) -> None:
    time.sleep(1.2)                                                          # metrics are published once a second
    before = client.metrics()
    with client.stream(ask("leaver", "hello world", max_tokens=480, ignore_eos=True)) as pieces:
        next(iter(pieces))
    until(lambda: value(client.metrics(), "tide_requests_finished_total") == value(before, "tide_requests_finished_total") + 1)
    assert value(client.metrics(), "tide_tokens_out_total") - value(before, "tide_tokens_out_total") < 480
    assert client.generate(ask("leaver", "hello", max_tokens=2)).num_output_tokens == 2       # its id is free again


def test_clients_that_leave_without_streaming_free_their_slots_by_their_deadline(client: TritonClient) -> None:
    """No front before it. More of them than there are slots; whoever asks next is served."""
    time.sleep(1.2)
    before = client.metrics()
    for i in range(12):
        connection = http.client.HTTPConnection(client.url.removeprefix("http://"), timeout=20)
        connection.request("POST", f"/v2/models/{client.model}/generate", json.dumps({
            "text_input": "hello", "request_id": f"away-{i}", "sampling_param_max_tokens": 480, "sampling_param_ignore_eos": True,
            "deadline_s": 0.5}))
        time.sleep(0.01)
        connection.close()
    assert client.generate(ask("next", "hello", max_tokens=3)).num_output_tokens == 3
    ended = "tide_requests_finished_total"
    until(lambda: value(client.metrics(), ended) == value(before, ended) + 13 and not value(client.metrics(), "tide_kv_tokens_used"), 20)


def test_a_running_request_is_cancelled_by_its_id(client: TritonClient) -> None:
    cancel_while_it_streams(client)
    with pytest.raises(InvalidRequest):
        client.cancel("slow")


def test_a_deadline_ends_the_request_with_what_there_is(client: TritonClient) -> None:
    result = client.generate(ask("late", "hello world", max_tokens=490, ignore_eos=True, deadline_s=0.05))
    assert result.finish_reason == "deadline" and result.num_output_tokens < 490


def test_drafts_change_under_load_without_a_failed_request(place: Place, client: TritonClient) -> None:
    """Last of those on this server: from here on it has drafts."""
    prompts = [f"prompt number {i} of a few" for i in range(8)]
    requests = [ask("", prompt, max_tokens=40, speculation="3", ignore_eos=True) for prompt in prompts]
    plain = [plain_text(place, ask(f"plain-{i}", prompt, max_tokens=40, ignore_eos=True)) for i, prompt in enumerate(prompts)]
    first, second = place.build("v1-one"), place.build("v2-two", noise=0.3, seed=3)
    place.deploy({"*": first.build_id})
    until(lambda: value(client.metrics(), "tide_draft_info", "v1-one") == 1)
    done, results = threading.Event(), []

    def load(i: int) -> None:
        round_ = 0
        while not done.is_set():
            request = GenerationRequest(f"load-{i}-{round_}", requests[i].prompt, requests[i].sampling, requests[i].speculation)
            with client.stream(request) as pieces:
                assert "".join(pieces) == plain[i]
            assert pieces.result is not None
            results.append(pieces.result)
            round_ += 1

    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(load, i) for i in range(8)]
        until(lambda: len(results) >= 16)
        place.deploy({"*": second.build_id})
        until(lambda: sum(r.draft_version == "v2-two" for r in list(results)) >= 16)
        done.set()
        for stream in streams:
            stream.result()
    check_swap(place, client, results, second.build_id)


def check_swap(place: Place, client: TritonClient, results: list[GenerationResult], build_id: str) -> None:
    versions = [r.draft_version for r in results]
    assert set(versions) == {"v1-one", "v2-two"} and all(r.verify_steps > 0 and r.num_output_tokens == 40 for r in results)
    seen = read_observed(place.config.state.observed, "tiny")["replica-0"]
    assert (seen.deployment, seen.drafts, seen.error) == (2, {"*": build_id}, "") and seen.acceptance_length > 1.0
    until(lambda: value(client.metrics(), "tide_draft_info", "v2-two") == 1 and value(client.metrics(), "tide_draft_info", "v1-one") == 0)
    metrics = client.metrics()
    for name in ("tide_tokens_out_total", "tide_speculation_on_seconds_total", "tide_draft_length_steps_total", "tide_kv_tokens_capacity",
                 "tide_first_position_rate", "tide_captured_tokens_total", "tide_tokens_per_s"):
        assert value(metrics, name) > 0, name
    for name in ("tide_speculation_off_seconds_total", "tide_running_requests", "tide_waiting_requests", "tide_kv_tokens_used",
                 "tide_dropped_tokens_total", "tide_sink_errors_total", "tide_draft_agent_error"):
        assert any(series.startswith(name) for series in metrics), name
    assert value(metrics, "tide_deployment") == value(metrics, "tide_deployment_desired") == 2
    assert value(metrics, "tide_digest_mismatches_total") == 0
    assert 0 <= time.time() - value(metrics, "tide_draft_deployed_timestamp_seconds", "v2-two") < 3_600
    assert value(metrics, "tide_draft_deployed_timestamp_seconds", "v1-one") == 0, "no longer served"


def test_the_document_lists_what_is_published(client: TritonClient) -> None:
    """Name by name: kind, labels. A histogram is three families."""
    with urllib.request.urlopen(client.metrics_url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    kinds = [line.split()[2:] for line in lines if line.startswith("# TYPE tide_")]
    published: dict[str, tuple[str, set[str]]] = {name: (kind, set()) for name, kind in kinds}
    for line in lines:
        if line.startswith("tide_"):
            published[line.partition("{")[0]][1].update(re.findall(r'(\w+)="', line))
    documented: dict[str, tuple[str, set[str]]] = {}
    for name, kind, labels in re.findall(r"^\| `(tide_\w+)` \| (\w+) \| [^|]+ \| ([^|]*)\|", METRICS_DOC.read_text(), re.M):
        expected = {"target", "replica", *re.findall(r"`(\w+)`", labels)}
        if kind == "histogram":
            documented |= {f"{name}_bucket": ("counter", expected | {"le"}), f"{name}_sum": ("counter", expected),
                           f"{name}_count": ("counter", expected)}
        else:
            documented[name] = ("counter" if kind == "counter" else "gauge", expected)
    assert published == documented


def test_waits_and_ends_are_published(client: TritonClient) -> None:
    """One request that is answered and one that is cancelled, in the histograms and by reason."""
    time.sleep(1.2)
    before = client.metrics()
    client.generate(ask("counted", "hello world", max_tokens=9, ignore_eos=True))
    with client.stream(ask("uncounted", "hello world", max_tokens=480, ignore_eos=True)) as pieces:
        next(iter(pieces))
    ended = "tide_requests_ended_total"
    until(lambda: value(client.metrics(), ended, "cancelled") == value(before, ended, "cancelled") + 1)
    grown = {name: value(client.metrics(), name) - value(before, name) for name in
             ("tide_ttft_seconds_count", "tide_queue_seconds_count", "tide_inter_token_seconds_count", "tide_response_delay_seconds_count")}
    assert value(client.metrics(), ended, "length") == value(before, ended, "length") + 1
    assert (grown["tide_ttft_seconds_count"], grown["tide_queue_seconds_count"]) == (2, 2)
    assert grown["tide_inter_token_seconds_count"] >= 8 and grown["tide_response_delay_seconds_count"] >= 3
    assert value(client.metrics(), "tide_ttft_seconds_bucket", 'le="+Inf"') == value(client.metrics(), "tide_ttft_seconds_count")
    assert 0 < value(client.metrics(), "tide_position_acceptance_rate", 'position="1"') <= 1


def test_what_a_request_waited_before_triton_counts(client: TritonClient) -> None:
    """As the front stamps it."""
    time.sleep(1.2)
    before = value(client.metrics(), "tide_ttft_seconds_sum")
    assert post(client, {"text_input": "hello", "tide_received_at": f"{time.time() - 100:.6f}"})[0] == 200
    until(lambda: value(client.metrics(), "tide_ttft_seconds_sum") >= before + 100)


def test_nothing_of_a_prompt_is_logged(replica: TritonReplica, client: TritonClient) -> None:
    with contextlib.suppress(InvalidRequest):
        client.generate(ask("secret-a", "xyzzy-secret", max_tokens=2))
        client.generate(ask("secret-b", "xyzzy-secret" * 60, max_tokens=2))
    assert "xyzzy" not in replica.log.read_text(errors="replace")


# --- the supervisor ----------------------------------------------------------------------------------------------

def supervise(place: Place, state_file: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "tide_pipeline.serve.supervisor", "--config", str(place.config_file),
                             "--state-file", str(state_file), *words], stderr=subprocess.PIPE, text=True)


def regions_of(triton_pid: int) -> list[Path]:
    """Shared memory of a server, as its stub's command line names it."""
    lines = [Path(f"/proc/{pid}/cmdline").read_text() for pid in group_members(triton_pid)]
    return [Path("/dev/shm", argument) for line in lines for argument in line.split("\0") if argument.startswith("tide-")]


def state_of(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}


def test_supervisor_restarts_a_killed_server_and_leaves_nothing_behind(tmp_path: Path) -> None:
    place, file = write_place(tmp_path, SERVE), tmp_path / "supervisor.json"
    place.deploy({"*": place.build("v1-one").build_id})
    supervisor = supervise(place, file)
    try:
        until(lambda: state_of(file).get("state") == "ready")
        killed = state_of(file)["triton_pid"]
        os.kill(killed, signal.SIGKILL)
        until(lambda: {"state": "ready", "restarts": 1}.items() <= state_of(file).items())
        again = state_of(file)
        regions = regions_of(again["triton_pid"])
        assert again["triton_pid"] != killed and not group_members(killed)
        client = TritonClient(again["http_url"], "tiny", metrics_url=again["metrics_url"])
        assert client.generate(ask("a", "hello", max_tokens=5)).draft_version == "v1-one", "it comes back on the desired build"
        supervisor.kill()                                    # nothing may outlive it, not even then
        supervisor.wait()
        until(lambda: not group_members(again["triton_pid"]))
        remove_stale_shared_memory()                         # a stub that died in a call to its server leaves this to the next start
        assert regions and not any(region.exists() for region in regions), "shared memory was left behind"
    finally:
        supervisor.kill()
        supervisor.communicate()


def test_supervisor_stops_on_sigterm_even_while_starting(tmp_path: Path) -> None:
    place, file = write_place(tmp_path, SERVE), tmp_path / "supervisor.json"
    supervisor = supervise(place, file)
    try:
        until(lambda: bool(state_of(file).get("triton_pid")))
        supervisor.terminate()
        assert supervisor.wait(60) == 0
        assert state_of(file)["state"] == "stopped" and not group_members(state_of(file)["triton_pid"])
    finally:
        supervisor.kill()
        supervisor.communicate()


def test_supervisor_names_the_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        place = write_place(tmp_path, {"stack": {"triton_http_port": other.getsockname()[1]}})
        supervisor = supervise(place, tmp_path / "supervisor.json")
        _, errors = supervisor.communicate(timeout=120)
    assert supervisor.returncode == 2 and "set stack.triton_http_port" in errors
    assert state_of(tmp_path / "supervisor.json")["state"] == "failed"


def test_an_engine_that_can_not_load_says_why(tmp_path: Path) -> None:
    place = write_place(tmp_path)
    (place.config.engine_dir / "target" / "tokenizer.json").write_text("{")
    freeze(place.config, place.config_file)
    supervisor = supervise(place, tmp_path / "supervisor.json")
    _, errors = supervisor.communicate(timeout=120)
    assert supervisor.returncode == 2 and "tokenizer.json can't be read" in errors
