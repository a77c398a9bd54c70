"""Judge the body of a generate request before Triton does. Knows our inputs' names and types; knows no HTTP, and no engine.

Triton 2.51 answers JSON of the wrong type with 500 and wraps integers that don't fit (4294967298 tokens are 2). Half a megabyte of `[` ends
its process: its parser is recursive. What passes here is written anew, so that the two parsers can't disagree about it. Ranges that the
engine judges, and a missing prompt, are left to them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tide_pipeline.errors import InvalidRequest
from tide_pipeline.serve.request import RECEIVED_AT, RESERVED, unknown_input
from tide_pipeline.serve.tensors import INPUTS

FP32_MAX = 3.4028234663852886e38
NESTED = "parameters"              # Triton reads its members as if they stood outside
SHOWN = 40                         # characters of a refused value that its sender is told
NAMED = 80                         # and of a name


@dataclass(frozen=True, slots=True)
class Checked:
    """A body that Triton can parse, and what the front must know of it."""

    body: bytes
    request_id: str                # "" when the client gave none
    deadline_s: float              # 0 when the client gave none


@dataclass(frozen=True, slots=True)
class Kind:
    """What one element of an input may be."""

    expected: str
    accepts: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


KINDS = {
    "TYPE_STRING": Kind("a string", lambda value: isinstance(value, str)),
    "TYPE_BOOL": Kind("true or false", lambda value: isinstance(value, bool)),
    "TYPE_INT32": Kind("an integer from -2147483648 to 2147483647", lambda value: _is_integer(value, -2**31, 2**31 - 1)),
    "TYPE_UINT64": Kind("an integer from 0 to 18446744073709551615", lambda value: _is_integer(value, 0, 2**64 - 1)),
    "TYPE_FP32": Kind("a number that fits 32 bits", lambda value: _is_number(value) and abs(value) <= FP32_MAX),
}
PARAMETER = Kind("a string, a number, true or false",
                 lambda value: isinstance(value, str | bool) or (_is_number(value) and abs(value) <= FP32_MAX))
INPUT_KINDS = {spec.name: KINDS[spec.data_type] for spec in INPUTS}


def check_generate(body: bytes, *, streams: bool, received_at: float | None = None) -> Checked:
    """Raises InvalidRequest, naming the field, what was given and what is expected. `streams`: it came to generate_stream.

    `received_at` (Unix seconds) is told to the model: what a request waits in Triton's own queue can't be seen from there.
    """
    members = _parse(body)
    _check(members, is_nested=False)
    flat = {**members.get(NESTED, {}), **members}
    if not streams and _first(flat.get("streaming")) is True:
        raise InvalidRequest("streaming is true, but /generate sends one answer: call /generate_stream, or leave streaming out")
    request_id = flat.get("request_id", flat.get("id", ""))
    if received_at is not None:
        members[RECEIVED_AT] = f"{received_at:.6f}"
    return Checked(json.dumps(members, ensure_ascii=False, separators=(",", ":")).encode(), str(_first(request_id) or ""),
                   float(_first(flat.get("deadline_s")) or 0.0))


def _parse(body: bytes) -> dict[str, Any]:
    if not body.strip():
        raise InvalidRequest('the body is empty: send JSON such as {"text_input": "hello"}')
    try:
        members = json.loads(body.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not valid UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error.msg.removesuffix(' at')} at character {error.pos}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply: no input is more than an array of values") from None
    except ValueError:                                     # Python refuses to convert thousands of digits
        raise InvalidRequest("the body holds a number of too many digits") from None
    if not isinstance(members, dict):
        raise InvalidRequest(f"the body must be a JSON object, got {_shown(members)}")
    return members


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise InvalidRequest(f"{twice[:NAMED]!r} is given twice: give it once")
    return members


def _refuse_constant(constant: str) -> Any:
    raise InvalidRequest(f"{constant} is no JSON number: give a finite one")


def _check(members: dict[str, Any], *, is_nested: bool) -> None:
    for name, value in members.items():
        _check_text("a name", name)
        if name in INPUT_KINDS:
            _check_input(name, value, INPUT_KINDS[name])
        elif name == NESTED and not is_nested:
            if not isinstance(value, dict):
                raise InvalidRequest(f"{name} must be an object, got {_shown(value)}")
            _check(value, is_nested=True)
        elif name in RESERVED or (name.startswith("triton_") and name.isprintable()):    # NUL ends a name for Triton, and is then a 500
            _check_element(name, value, KINDS["TYPE_STRING"] if name == "id" else PARAMETER)
        else:
            raise unknown_input(name)


def _check_input(name: str, value: Any, kind: Kind) -> None:
    """One value, or an array of them; how many an input may hold is the model's to judge."""
    for element in value if isinstance(value, list) else [value]:
        _check_element(name, element, kind)


def _check_element(name: str, value: Any, kind: Kind) -> None:
    if not kind.accepts(value):
        raise InvalidRequest(f"{name[:NAMED]} must be {kind.expected}, got {_shown(value)}")
    if isinstance(value, str):
        _check_text(name[:NAMED], value)


def _check_text(what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{what} holds half a surrogate pair at character {error.start}: it is no text") from None


def _first(value: Any) -> Any:
    return (value[0] if value else None) if isinstance(value, list) else value


def _shown(value: Any) -> str:
    """For the sender's eyes alone: never logged."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    if isinstance(value, str):
        return f"the string {value[:SHOWN]!r}" + (" and more" if len(value) > SHOWN else "")
    if isinstance(value, float) and not math.isfinite(value):
        return "a number beyond 64 bits"
    text = json.dumps(value)
    return text[:SHOWN] + ("... and more digits" if len(text) > SHOWN else "")
