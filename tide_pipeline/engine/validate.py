"""Refuse a request that can't be served, before it takes a place in the queue."""

from __future__ import annotations

import math
from collections.abc import Container

from tide_pipeline.contracts import GenerationRequest
from tide_pipeline.engine.text import TextCodec
from tide_pipeline.errors import EngineClosed, InvalidRequest, PromptTooLong, QueueFull


def validate(request: GenerationRequest, codec: TextCodec, max_context: int, max_depth: int) -> tuple[list[int], int | None]:
    """Prompt tokens and the fixed draft length (None for "auto"). Raises InvalidRequest, PromptTooLong."""
    how = request.sampling
    if not request.request_id:
        raise InvalidRequest("request_id is empty")
    if how.max_tokens < 1:
        raise InvalidRequest(f"max_tokens must be at least 1, got {how.max_tokens}")
    if not (math.isfinite(how.temperature) and 0.0 <= how.temperature <= 10.0):
        raise InvalidRequest(f"temperature must be between 0 (greedy) and 10, got {how.temperature}")
    if not (math.isfinite(how.top_p) and 0.0 < how.top_p <= 1.0):
        raise InvalidRequest(f"top_p must be above 0 and at most 1, got {how.top_p}")
    if how.top_k < 0:
        raise InvalidRequest(f"top_k must be 0 (off) or more, got {how.top_k}")
    if not request.deadline_s > 0:
        raise InvalidRequest(f"the deadline must be above 0 seconds, got {request.deadline_s}")
    for name, value in (("workload", request.workload), ("tenant", request.tenant), ("request_id", request.request_id)):
        if not value or len(value) > 128 or not value.isprintable():
            raise InvalidRequest(f"{name} must be 1 to 128 printable characters")
    fixed = _draft_length(request.speculation, max_depth)
    prompt = codec.encode(request.prompt)
    if len(prompt) + how.max_tokens > max_context:
        raise PromptTooLong(f"prompt of {len(prompt)} tokens and max_tokens {how.max_tokens} exceed this engine's context "
                            f"of {max_context}: shorten the prompt or ask for fewer tokens")
    return prompt, fixed


def check_room(request_id: str, in_use: Container[str], waiting: int, queue_size: int, closed: bool) -> None:
    """Whether one more may wait; under the lock of the queue. Raises EngineClosed, InvalidRequest, QueueFull."""
    if closed:
        raise EngineClosed("the engine is shutting down: send the request to another replica")
    if request_id in in_use:
        raise InvalidRequest(f"request_id {request_id!r} is in use by a running request: choose another")
    if waiting >= queue_size:
        raise QueueFull(f"{waiting} requests are waiting already: try again later")


def _draft_length(speculation: str, max_depth: int) -> int | None:
    if speculation == "auto":
        return None
    if speculation == "off":
        return 0
    if speculation in map(str, range(max_depth + 1)):
        return int(speculation)
    raise InvalidRequest(f"speculation must be auto, off or a draft length of 0 to {max_depth}, got {speculation!r}")
