"""Tensors of one request to a GenerationRequest, with TensorRT-LLM's defaults. Knows names and types; knows no Triton and no engine."""

from __future__ import annotations

import difflib
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tide_pipeline.contracts import GenerationRequest, SamplingParams
from tide_pipeline.errors import InvalidRequest
from tide_pipeline.serve.tensors import INPUTS

DEFAULT_MAX_TOKENS = 32                # TensorRT-LLM's SamplingParams
RESERVED = {"id", "sequence_id", "sequence_start", "sequence_end", "priority", "timeout"}    # Triton's own request parameters
RECEIVED_AT = "tide_received_at"       # the front's own request parameter, Unix seconds
LONGEST_WAIT_S = 3_600.0               # a stamp that is older, or from the future, is not believed


@dataclass(frozen=True, slots=True)
class Asked:
    """A request and how its answer should look."""

    request: GenerationRequest
    streaming: bool                    # one response per engine step, each with the text so far; otherwise a single one
    echo: bool                         # a single response begins with the prompt
    with_finish_reason: bool
    with_counters: bool
    is_stop: bool                      # cancels the running request of this id
    began: float = field(default_factory=time.monotonic, compare=False)       # when it arrived, of time.monotonic()


class Tensors:
    """Arrays by input name."""

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self._arrays = arrays

    def scalar(self, name: str) -> Any:
        """The tensor's only element, None where it is absent. Raises InvalidRequest for any other number of elements."""
        if (array := self._arrays.get(name)) is None:
            return None
        if array.size != 1:
            raise InvalidRequest(f"{name} must hold one element, got {array.size}")
        return array.item()

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.scalar(name)
        return default if value is None else bool(value)

    def text(self, name: str, default: str) -> str:
        value = self.scalar(name)
        return default if value is None else _decode(name, value)

    def texts(self, name: str) -> tuple[str, ...]:
        array = self._arrays.get(name)
        return () if array is None else tuple(_decode(name, value) for value in array.flatten())

    def real(self, name: str) -> float | None:
        """As the client wrote it: 0.8, not the 0.800000011920929 that fp32 makes of it."""
        value = self.scalar(name)
        return None if value is None else float(f"{value:.7g}")


def parse_request(arrays: Mapping[str, Any], parameters: Mapping[str, Any], *, triton_id: str = "", default_deadline_s: float) -> Asked:
    """Raises InvalidRequest. What the engine must judge (prompt, lengths, ranges) is left to it."""
    _refuse_unknown(parameters)
    tensors = Tensors(arrays)
    deadline_s = tensors.real("deadline_s")
    request = GenerationRequest(
        request_id=tensors.text("request_id", triton_id or uuid.uuid4().hex), prompt=tensors.text("text_input", ""),
        sampling=_sampling(tensors), speculation=tensors.text("speculation", "auto"), workload=tensors.text("workload", "default"),
        tenant=tensors.text("tenant", "default"), deadline_s=default_deadline_s if deadline_s is None else deadline_s)
    return Asked(request, streaming=tensors.flag("streaming"), echo=not tensors.flag("sampling_param_exclude_input_from_output"),
                 with_finish_reason=tensors.flag("return_finish_reason"),
                 with_counters=tensors.flag("sampling_param_return_perf_metrics", default=True), is_stop=tensors.flag("stop"),
                 began=time.monotonic() - _waited_s(parameters))


def _sampling(tensors: Tensors) -> SamplingParams:
    """Greedy unless the request names a temperature, top_k above 1 or top_p: then, as in TensorRT-LLM, the temperature is 1."""
    max_tokens, top_k = tensors.scalar("sampling_param_max_tokens"), tensors.scalar("sampling_param_top_k")
    temperature, top_p = tensors.real("sampling_param_temperature"), tensors.real("sampling_param_top_p")
    if temperature is None:
        temperature = 1.0 if (top_k is not None and top_k != 1) or top_p is not None else 0.0
    return SamplingParams(
        max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else int(max_tokens), temperature=temperature, top_k=int(top_k or 0),
        top_p=1.0 if top_p is None else top_p, seed=int(tensors.scalar("sampling_param_seed") or 0),
        stop=tensors.texts("sampling_param_stop"), ignore_eos=tensors.flag("sampling_param_ignore_eos"))


def _refuse_unknown(parameters: Mapping[str, Any]) -> None:
    """Triton's generate endpoint makes a request parameter of every JSON key that is no input: a typing error would pass unseen."""
    for name in parameters:
        if name not in RESERVED and name != RECEIVED_AT and not name.startswith("triton_"):
            raise unknown_input(name)


def _waited_s(parameters: Mapping[str, Any]) -> float:
    """Between the front and here."""
    try:
        waited_s = time.time() - float(parameters[RECEIVED_AT])
    except (KeyError, ValueError, TypeError):
        return 0.0
    return waited_s if 0.0 <= waited_s <= LONGEST_WAIT_S else 0.0


def unknown_input(name: str) -> InvalidRequest:
    """With the nearest known name: for `max_tokens` the one that ends so."""
    known, name = [spec.name for spec in INPUTS], name[:80]
    near = [spec for spec in known if spec.endswith(f"_{name}")] or difflib.get_close_matches(name, known, n=1)
    return InvalidRequest(f"unknown input {name!r}" + (f", did you mean {near[0]!r}?" if near else ""))


def _decode(name: str, value: Any) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"{name} is not valid UTF-8: {error.reason} at byte {error.start}") from error
    return str(value)
