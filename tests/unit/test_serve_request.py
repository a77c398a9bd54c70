"""Tensors of a request: defaults, refusals."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from tide_pipeline.errors import InvalidRequest
from tide_pipeline.serve.request import Asked, parse_request

Arrays = dict[str, Any]


def text(*values: str) -> Any:
    return np.array([v.encode() for v in values], dtype=np.object_)


def parse(parameters: dict[str, Any] | None = None, triton_id: str = "", **arrays: Any) -> Asked:
    return parse_request({"text_input": text("hello"), **arrays}, parameters or {}, triton_id=triton_id, default_deadline_s=7.0)


def test_defaults_are_tensorrt_llms() -> None:
    asked = parse()
    sampling = asked.request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed) == (32, 0.0, 0, 1.0, 0)
    assert asked.echo and not asked.streaming and not asked.with_finish_reason and not asked.is_stop
    assert (asked.request.speculation, asked.request.workload, asked.request.tenant) == ("auto", "default", "default")
    assert asked.request.deadline_s == 7.0 and asked.request.request_id


def test_every_input_arrives() -> None:
    asked = parse(streaming=np.array([True]), sampling_param_max_tokens=np.array([9], np.int32),
                  sampling_param_temperature=np.array([0.8], np.float32), sampling_param_top_k=np.array([5], np.int32),
                  sampling_param_top_p=np.array([0.9], np.float32), sampling_param_stop=text("a", "ß"),
                  sampling_param_seed=np.array([2**64 - 1], np.uint64), sampling_param_ignore_eos=np.array([True]),
                  sampling_param_exclude_input_from_output=np.array([True]), return_finish_reason=np.array([True]),
                  sampling_param_return_perf_metrics=np.array([False]), speculation=text("3"), workload=text("de"), tenant=text("acme"),
                  request_id=text("r1"), deadline_s=np.array([1.5], np.float32))
    request, sampling = asked.request, asked.request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k, sampling.top_p) == (9, 0.8, 5, 0.9)
    assert (sampling.stop, sampling.seed, sampling.ignore_eos) == (("a", "ß"), 2**64 - 1, True)
    assert (request.speculation, request.workload, request.tenant, request.request_id, request.deadline_s) == ("3", "de", "acme", "r1", 1.5)
    assert asked.streaming and not asked.echo and asked.with_finish_reason and not asked.with_counters


@pytest.mark.parametrize(("arrays", "temperature"), [
    ({"sampling_param_top_k": np.array([1], np.int32)}, 0.0), ({"sampling_param_top_k": np.array([4], np.int32)}, 1.0),
    ({"sampling_param_top_p": np.array([0.9], np.float32)}, 1.0), ({"sampling_param_temperature": np.array([0.0], np.float32)}, 0.0)])
def test_temperature_follows_from_what_is_named(arrays: Arrays, temperature: float) -> None:
    assert parse(**arrays).request.sampling.temperature == temperature


def test_triton_id_is_the_request_id_unless_one_is_given() -> None:
    assert parse(triton_id="t").request.request_id == "t"
    assert parse(triton_id="t", request_id=text("mine")).request.request_id == "mine"


def test_unknown_names_are_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(InvalidRequest, match="did you mean 'sampling_param_max_tokens'"):
        parse({"sampling_param_max_token": 3})
    parse({"id": "x", "triton_enable_empty_final_response": False})


@pytest.mark.parametrize("arrays", [{"text_input": text("a", "b")}, {"text_input": np.array([b"\xff"], dtype=np.object_)},
                                    {"speculation": text("1", "2")}])
def test_what_is_no_single_text_is_refused(arrays: Arrays) -> None:
    with pytest.raises(InvalidRequest):
        parse(**arrays)


@pytest.mark.parametrize(("stamp", "waited_s"), [(-4.0, 4.0), (60.0, 0.0), (-1e6, 0.0), ("yesterday", 0.0), (None, 0.0)])
def test_a_stamp_of_the_front_tells_when_a_request_arrived(stamp: Any, waited_s: float) -> None:
    """One from the future, from long ago or of no sense is not believed."""
    told = stamp if stamp is None or isinstance(stamp, str) else f"{time.time() + stamp:.6f}"
    began = parse({"tide_received_at": told}).began
    assert time.monotonic() - began == pytest.approx(waited_s, abs=0.5)
