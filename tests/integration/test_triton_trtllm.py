"""The real Triton server on the TensorRT-LLM backend, with the stand-in on PYTHONPATH: what clients of the embedded engine see, on the
repository that `tide build` rendered; the lake; and a rollout, judged by the gate and timed on its canary, in which a new server takes
over, beside the old one or in its place."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.built import BuiltReplica
from tests.helpers import ask
from tests.integration.test_triton import (  # noqa: F401 the same tests, of this module's server
    state_of,
    supervise,
    test_a_client_that_disconnects_frees_its_slot,
    test_a_deadline_ends_the_request_with_what_there_is,
    test_a_full_queue_is_503_and_serving_goes_on,
    test_a_running_request_is_cancelled_by_its_id,
    test_bad_requests_are_400,
    test_clients_that_leave_without_streaming_free_their_slots_by_their_deadline,
    test_management_endpoints_are_closed,
    test_nothing_of_a_prompt_is_logged,
    test_raw_generate_looks_like_tensorrt_llms,
    test_ready_and_generating_without_a_record,
    test_stream_sends_steps_and_ends_with_the_totals,
    test_what_a_request_waited_before_triton_counts,
    test_wrong_types_are_refused_by_triton_itself,
)
from tests.integration.test_triton import test_the_document_lists_what_is_published as check_the_document
from tests.serving import Place, plain_text, until, value
from tests.trtllm import KnownNetwork, write_trtllm_place
from tests.trtllm_stand_in import write_stand_in
from tide_pipeline.capture.reader import list_windows, read_states
from tide_pipeline.cli import app
from tide_pipeline.config import override
from tide_pipeline.contracts import EngineBuild, GenerationRequest, from_dict
from tide_pipeline.deployment.record import read_observed
from tide_pipeline.engine.text import TextCodec
from tide_pipeline.errors import InvalidRequest
from tide_pipeline.gate.run import run_gate
from tide_pipeline.rollout.promote import promote
from tide_pipeline.serve.client import TritonClient
from tide_pipeline.serve.front.replicas import ReplicaSpec, read_replicas, write_replicas
from tide_pipeline.serve.process import group_members
from tide_pipeline.serve.triton import TritonReplica

SERVE = {"serve": {"gpu": "h100", "max_batch": 8, "queue_size": 8, "agent_poll_s": 0.1, "report_s": 0.2},
         "capture": {"mode": "on", "flush_s": 0.2}}
JUDGED = {"gate": {"min_gain": -1.0, "max_workload_loss": 1.0, "min_prompts": 4, "bootstrap": 100}, "training": {"eval_share": 0.5},
          "rollout": {"bake_s": 1.0, "min_bake_steps": 10, "max_bake_s": 240.0, "max_slowdown": 4.0}}      # a machine full of tests
ADDRESSES = ("http_url", "grpc_url", "metrics_url")


@pytest.fixture(scope="module")
def on_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """tensorrt_llm 1.3 for every process that this one starts; not for this one."""
    folder = tmp_path_factory.mktemp("path")
    write_stand_in(folder, "1.3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        patch.setenv("STAND_IN_PASS_S", "0.005")
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return write_trtllm_place(tmp_path_factory.mktemp("triton"), "1.3", SERVE)


@pytest.fixture(scope="module")
def replica(place: Place, on_path: None) -> Iterator[TritonReplica]:
    """Without a deployment record, so without a draft."""
    with BuiltReplica(place, tide_build(place)) as running:
        yield running


def tide_build(place: Place, *words: str, noise: float = 0.1, seed: int = 0) -> EngineBuild:
    """By the command, of a draft in a folder."""
    draft = Path(place.build(f"v{len(words)}-for-its-draft", noise=noise, seed=seed).path) / "draft"
    done = CliRunner().invoke(app, ["build", "--config", str(place.config_file), "--backend", "trtllm", "--trtllm", "1.3", "--json",
                                    "--draft", str(draft), *words])
    assert done.exit_code == 0, done.stderr
    return from_dict(EngineBuild, json.loads(done.stdout))


@pytest.fixture
def client(replica: TritonReplica) -> TritonClient:
    return replica.client


def test_a_built_repository_serves_its_draft_by_its_schedule(tmp_path: Path, on_path: None) -> None:
    """What the record names is the build itself; model.yaml and the server agree on the lengths."""
    place = write_trtllm_place(tmp_path, "1.3", SERVE)
    build = tide_build(place, "--set", "speculation.draft_schedule=[[2, 3], [8, 1]]")
    assert "draft_len_schedule:\n    2: 3\n    8: 1\n" in (Path(build.path) / "model_repository" / "tiny" / "1" / "model.yaml").read_text()
    place.deploy({"*": build.build_id})
    request = ask("built", "hello world", max_tokens=24, ignore_eos=True)
    with BuiltReplica(place, build) as replica:
        result = replica.client.generate(request)
        with pytest.raises(InvalidRequest, match="its schedule decides by batch size"):
            replica.client.generate(replace(request, request_id="fixed", speculation="3"))
    assert result.text == plain_text(place, request) and result.draft_version == build.draft_version and result.drafted > 0


def test_states_reach_the_lake_bit_for_bit(tmp_path: Path, on_path: None) -> None:
    place = write_trtllm_place(tmp_path, "1.3", SERVE)
    place.deploy({"*": place.build("v1-one").build_id})
    requests = [ask(f"lake-{i}", f"prompt {i} of several {'and more ' * i}", max_tokens=12 + 9 * i, ignore_eos=True) for i in range(5)]
    with TritonReplica(place.config, place.config_file) as replica:
        results = [replica.client.generate(request) for request in requests]
        until(lambda: value(replica.client.metrics(), "tide_captured_tokens_total") > 0)
        time.sleep(2.2)                                              # metrics are published once a second
        check_the_document(replica.client)
        metrics = replica.client.metrics()
    assert value(metrics, "tide_capture_faults_total") == 0 and value(metrics, "tide_first_position_rate", "v1-one") > 0
    codec, known = TextCodec(place.config.engine_dir / "target"), KnownNetwork(place)
    found = {states.window.request_id: states for states in read_states(list_windows(place.config.state.signals, "tiny").windows)}
    assert found.keys() == {request.request_id for request in requests}
    for request, result in zip(requests, results, strict=True):
        states, prompt = found[request.request_id], codec.encode(request.prompt)
        text = [*prompt, *known.continuation(prompt, request.sampling.max_tokens, ends=False)]
        start = states.window.start_pos
        assert result.text == plain_text(place, request) and result.draft_version == states.window.draft_version == "v1-one"
        assert states.token_ids.tolist() == text[start:] and states.final_TD is None
        assert torch.equal(states.taps_TG, known.states(text[:-1], start)) and len(states.rejected_R2) > 0


def test_a_rollout_gives_the_replica_a_new_server_and_no_request_fails(tmp_path: Path, on_path: None,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate judges what the server captured, and loads no engine; the only replica is timed against its own past."""
    monkeypatch.setattr("tide_pipeline.rollout.live.BLOCK_S", 0.3)
    place, file = write_trtllm_place(tmp_path, "1.3", SERVE), tmp_path / "supervisor.json"
    first, second = tide_build(place), tide_build(place, noise=0.3, seed=3)
    old, new = first.draft_version, second.draft_version
    place.deploy({"*": first.build_id})
    replicas = tmp_path / "replicas.json"
    write_replicas(replicas, [ReplicaSpec("replica-0", "http://127.0.0.1:1")])
    supervisor = supervise(place, file, "--replicas-file", str(replicas))
    done, failures, versions = threading.Event(), list[Exception](), list[str]()

    def load() -> None:
        """As a front does: to where the replica is now."""
        number = 0
        while not done.is_set():
            number += 1
            try:
                sampling = ask("", "", max_tokens=24, ignore_eos=True).sampling
                request = GenerationRequest(f"load-{number}", f"hello world {number % 40}", sampling)
                result = TritonClient(read_replicas(replicas)[0].url, "tiny").generate(request)
                assert result.num_output_tokens == 24
                versions.append(result.draft_version)
            except Exception as error:
                failures.append(error)

    try:
        until(lambda: read_replicas(replicas)[0].url == state_of(file).get("http_url"), 240)
        before = state_of(file)
        worker = threading.Thread(target=load)
        worker.start()
        until(lambda: len(versions) >= 40, 120)
        time.sleep(4.0)                                              # its past: stretches of time, and windows in the lake
        config = override(place.config, JUDGED)
        verdict = run_gate(config, second, first, workload="default").verdict
        assert verdict.passed and verdict.deferred == ("benchmark",) and verdict.champion == old, verdict.reasons
        deployment = promote(config, second, verdict, who="test", reason="a new draft")
        until(lambda: versions[-1] == new, 120)
        done.set()
        worker.join()
        after, seen = state_of(file), read_observed(place.config.state.observed, "tiny")["replica-0"]
        assert deployment.stage == "stable" and "time per token" in deployment.reason, deployment.reason
        assert (seen.drafts, seen.needs_restart, seen.error) == ({"*": second.build_id}, 0, "")
        assert not failures and set(versions) == {old, new} and versions == sorted(versions, key=[old, new].index)
        assert after["successions"] == 1 and after["restarts"] == 0 and after["triton_pid"] != before["triton_pid"]
        until(lambda: not group_members(before["triton_pid"]), 60)
    finally:
        done.set()
        supervisor.terminate()
        supervisor.wait(60)
        supervisor.communicate()


@pytest.mark.parametrize("draft_swap", ["restart", "blue_green"])
def test_restarted_in_its_place_there_are_never_two_servers(draft_swap: str, tmp_path: Path, on_path: None) -> None:
    """"restart", for GPUs that hold one; "blue_green" where no replicas file is given, as in Compose: the addresses stay as they are."""
    place = write_trtllm_place(tmp_path, "1.3", {**SERVE, "serve": {**SERVE["serve"], "draft_swap": draft_swap}})
    file = tmp_path / "supervisor.json"
    first, second = place.build("v1-one"), place.build("v2-two", noise=0.3, seed=3)
    place.deploy({"*": first.build_id})
    supervisor = supervise(place, file)
    try:
        until(lambda: state_of(file).get("state") == "ready", 240)
        before, most = state_of(file), 0
        assert TritonClient(before["http_url"], "tiny").generate(ask("old", "hello", max_tokens=5)).draft_version == "v1-one"
        place.deploy({"*": second.build_id})
        gives_up = time.monotonic() + 240
        while state_of(file).get("successions") != 1 and time.monotonic() < gives_up:
            most = max(most, len(servers_under(supervisor.pid)))
            time.sleep(0.02)
        after = state_of(file)
        assert most == 1 and (after["state"], after["successions"], after["restarts"]) == ("ready", 1, 0)
        assert after["triton_pid"] != before["triton_pid"] and not group_members(before["triton_pid"])
        assert [after[name] for name in ADDRESSES] == [before[name] for name in ADDRESSES]
        assert TritonClient(before["http_url"], "tiny").generate(ask("new", "hello", max_tokens=5)).draft_version == "v2-two"
    finally:
        supervisor.terminate()
        supervisor.wait(60)
        _, said = supervisor.communicate()
    assert said.count("blue_green needs --replicas-file, to tell the front of another address") == (draft_swap == "blue_green")


def servers_under(parent: int) -> list[int]:
    """Children of a process that run tritonserver."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, _, rest = stat.read_text().partition(" (")
            name, _, fields = rest.rpartition(") ")
            if int(fields.split()[1]) == parent and name.startswith("tritonserver"):
                found.append(int(pid))
    return found


def test_a_successor_that_does_not_load_leaves_the_old_server(tmp_path: Path, on_path: None) -> None:
    """The new server can't read the tokenizer and ends; the old one goes on, and says what it could not change to."""
    place, file = write_trtllm_place(tmp_path, "1.3", SERVE), tmp_path / "supervisor.json"
    first, second = place.build("v1-one"), place.build("v2-two", noise=0.3, seed=3)
    place.deploy({"*": first.build_id})
    supervisor = supervise(place, file, "--replicas-file", str(tmp_path / "replicas.json"))       # not written yet
    try:
        until(lambda: state_of(file).get("state") == "ready", 240)
        before = state_of(file)
        (place.config.engine_dir / "target" / "tokenizer.json").write_text("{")
        place.deploy({"*": second.build_id})
        until(lambda: "tokenizer.json can't be read" in state_of(file).get("error", ""), 240)
        after = state_of(file)
        assert (after["state"], after["triton_pid"], after["successions"]) == ("ready", before["triton_pid"], 0)
        result = TritonClient(after["http_url"], "tiny").generate(ask("still", "hello", max_tokens=5, ignore_eos=True))
        assert result.draft_version == "v1-one"
        assert read_observed(place.config.state.observed, "tiny")["replica-0"].needs_restart == 2
    finally:
        supervisor.terminate()
        supervisor.wait(60)
        supervisor.communicate()


def test_a_successor_in_its_place_that_does_not_load_is_started_again(tmp_path: Path, on_path: None) -> None:
    place, file = write_trtllm_place(tmp_path, "1.3", SERVE), tmp_path / "supervisor.json"
    place.deploy({"*": place.build("v1-one").build_id})
    second, tokenizer = place.build("v2-two", noise=0.3, seed=3), place.config.engine_dir / "target" / "tokenizer.json"
    supervisor = supervise(place, file)
    try:
        until(lambda: state_of(file).get("state") == "ready", 240)
        before, good = state_of(file), tokenizer.read_text()
        tokenizer.write_text("{")
        place.deploy({"*": second.build_id})
        until(lambda: state_of(file).get("restarts", 0) >= 1, 240)
        tokenizer.write_text(good)
        until(lambda: state_of(file).get("state") == "ready", 240)
        assert state_of(file)["http_url"] == before["http_url"]
        assert TritonClient(before["http_url"], "tiny").generate(ask("new", "hello", max_tokens=5)).draft_version == "v2-two"
    finally:
        supervisor.terminate()
        supervisor.wait(60)
        supervisor.communicate()
