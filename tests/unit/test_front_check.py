"""The front's judgement of bodies: a pass or a 400 for whatever comes, and nothing that request.py would see differently."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tide_pipeline.errors import InvalidRequest
from tide_pipeline.serve.front.check import Checked, check_generate
from tide_pipeline.serve.request import RESERVED, Asked, parse_request
from tide_pipeline.serve.tensors import INPUTS

DTYPES = {"TYPE_STRING": np.object_, "TYPE_BOOL": np.bool_, "TYPE_INT32": np.int32, "TYPE_UINT64": np.uint64, "TYPE_FP32": np.float32}
SPECS = {spec.name: spec.data_type for spec in INPUTS}
NAMES = [*SPECS, *sorted(RESERVED), "parameters", "triton_x"]

any_text = st.text(st.characters(), max_size=20)                       # half surrogate pairs too
scalars = st.none() | st.booleans() | st.integers() | st.integers(-2**33, 2**33) | st.floats() | any_text
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3)
                      | st.dictionaries(st.sampled_from(NAMES) | any_text, inner, max_size=3), max_leaves=6)
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
GOOD = {"TYPE_STRING": st.text(max_size=30), "TYPE_BOOL": st.booleans(), "TYPE_INT32": st.integers(-2**31, 2**31 - 1),
        "TYPE_UINT64": st.integers(0, 2**64 - 1), "TYPE_FP32": FLOATS}


def check(body: Any, streams: bool = True) -> Checked | str:
    """What passed, or why it did not."""
    try:
        return check_generate(body if isinstance(body, bytes) else json.dumps(body).encode(), streams=streams)
    except InvalidRequest as error:
        return str(error)


def asked(body: bytes) -> Asked:
    """As Triton hands it over: arrays of the declared types; what is no input is a parameter."""
    members = json.loads(body)
    members = {**members.pop("parameters", {}), **members}
    arrays, parameters = {}, {}
    for name, value in members.items():
        if name in SPECS:
            elements = [v.encode() if isinstance(v, str) else v for v in (value if isinstance(value, list) else [value])]
            arrays[name] = np.array(elements, dtype=DTYPES[SPECS[name]])
        elif name != "id":
            parameters[name] = value
    return parse_request(arrays, parameters, triton_id=members.get("id", "none"), default_deadline_s=9.0)


@given(st.dictionaries(st.sampled_from(NAMES) | any_text, values, max_size=4), st.booleans())
def test_any_json_for_any_field_passes_or_is_refused(body: dict[str, Any], streams: bool) -> None:
    """What passes is the same JSON, and the model can refuse it only for its sense."""
    found = check(body, streams)
    if isinstance(found, str):
        return
    assert json.loads(found.body) == body
    try:
        request = asked(found.body).request
    except InvalidRequest as error:
        assert "one element" in str(error)
    else:
        assert found.request_id in ("", request.request_id)


@given(st.binary(max_size=60) | any_text.map(lambda text: text.encode("utf-8", "surrogatepass")), st.booleans())
def test_any_bytes_pass_or_are_refused(body: bytes, streams: bool) -> None:
    assert check(body, streams)


@given(st.fixed_dictionaries({"request_id": GOOD["TYPE_STRING"], "deadline_s": FLOATS},
                             optional={name: GOOD[kind] for name, kind in SPECS.items() if name not in ("request_id", "deadline_s")}))
def test_what_the_tensors_declare_passes_and_means_the_same(body: dict[str, Any]) -> None:
    found = check(body)
    assert isinstance(found, Checked)
    assert asked(found.body) == asked(json.dumps(body).encode())
    assert (found.request_id, found.deadline_s) == (body["request_id"], body["deadline_s"])


@given(st.sampled_from(NAMES).map(lambda name: name[:-1]) | st.text(max_size=30))
def test_unknown_names_are_refused_in_the_models_words(name: str) -> None:
    try:
        parse_request({}, {} if name in SPECS or name == "parameters" else {name: 1}, default_deadline_s=1.0)
    except InvalidRequest as error:
        assert check({name: 1}) == str(error)


MANY_TOKENS = "sampling_param_max_tokens must be an integer from -2147483648 to 2147483647, got "


@pytest.mark.parametrize(("body", "says"), [
    ({"sampling_param_max_tokens": "many"}, MANY_TOKENS + "the string 'many'"), ({"sampling_param_max_tokens": True}, MANY_TOKENS + "true"),
    ({"sampling_param_max_tokens": 2**32 + 2}, MANY_TOKENS + "4294967298"), ({"sampling_param_max_tokens": 2.0}, MANY_TOKENS + "2.0"),
    ({"max_tokens": "many"}, "unknown input 'max_tokens', did you mean 'sampling_param_max_tokens'?"),
    ({"text_input": 5}, "text_input must be a string, got 5"), ({"text_input": None}, "text_input must be a string, got null"),
    ({"text_input": "\ud800"}, "text_input holds half a surrogate pair at character 0"),
    ({"triton_\udfff": 1}, "a name holds half a surrogate pair at character 7"), ({"triton_\0": 1}, "unknown input 'triton_\\x00'"),
    ({"streaming": "yes"}, "streaming must be true or false, got the string 'yes'"),
    ({"sampling_param_seed": -1}, "sampling_param_seed must be an integer from 0 to 18446744073709551615, got -1"),
    ({"sampling_param_temperature": 1e39}, "sampling_param_temperature must be a number that fits 32 bits, got 1e+39"),
    ({"sampling_param_temperature": float("nan")}, "NaN is no JSON number"), ({"sampling_param_stop": ["a", {}]}, "got an object"),
    ({"parameters": {"sampling_param_top_k": "5"}}, "sampling_param_top_k must be"), ({"parameters": {"parameters": {}}}, "unknown input"),
    ({"parameters": 5}, "parameters must be an object, got 5"), ({"id": 5}, "id must be a string"),
    ({"priority": None}, "priority must be a string, a number, true or false, got null"),
    (b'{"sampling_param_temperature": 1e999}', "got a number beyond 64 bits"),
    (b'{"deadline_s": 1, "deadline_s": 2}', "'deadline_s' is given twice"),
    (b'{"parameters": {"id": "a", "id": "b"}}', "'id' is given twice"), (b"[" * 500_000, "nested too deeply"),
    (b'{"triton_x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    (b'{"sampling_param_seed": ' + b"1" * 5_000 + b"}", "too many digits"),
    (b"", "the body is empty"), (b" \n", "the body is empty"), (b"{", "not valid JSON"), (b"[]", "must be a JSON object, got an array"),
    (b'{"text_input": "\xff"}', "not valid UTF-8: invalid start byte at byte 16")])
def test_refusals_name_the_field_what_was_given_and_what_is_expected(body: Any, says: str) -> None:
    found = check(body)
    assert isinstance(found, str) and says in found and len(found) < 300


def test_a_long_value_is_not_sent_back_whole() -> None:
    assert len(str(check({"sampling_param_max_tokens": "x" * 9_000}))) < 200
    assert len(str(check({"x" * 9_000: 1}))) < 200


def test_streaming_to_generate_is_refused_where_triton_says_200_with_an_error() -> None:
    assert "/generate_stream" in str(check({"text_input": "x", "streaming": True}, streams=False))
    assert isinstance(check({"text_input": "x", "streaming": False}, streams=False), Checked)


def test_what_triton_reads_is_kept() -> None:
    body = {"text_input": "Größe \u2028 \U0001f600 \x00", "id": "a", "parameters": {"priority": 1}, "deadline_s": [3], "triton_y": 0.5}
    found = check(body)
    assert isinstance(found, Checked) and json.loads(found.body) == body and (found.request_id, found.deadline_s) == ("a", 3.0)
    assert check(b"\xef\xbb\xbf{}") == Checked(b"{}", "", 0.0)
