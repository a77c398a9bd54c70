"""Requests as the stand-in's server holds them, and what of them goes into the next pass. Knows no network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .network import prefix_hash

BLOCK = 8                              # tokens of a block of the prefix cache


class RequestState:
    """Base of LlmRequest. The host's view; with the overlap scheduler it lags a pass behind the device's."""

    def __init__(self, request_id: int, client_id: int, prompt: list[int], max_tokens: int, end_ids: tuple[int, ...],
                 respond: Callable[[list[int], str | None, float], None], is_dummy: bool = False) -> None:
        self.py_request_id, self.py_client_id, self.is_dummy = request_id, client_id, is_dummy
        self.prompt, self.max_tokens, self.end_ids, self.respond = prompt, max_tokens, end_ids, respond
        self.context_current_position, self.context_chunk_size = 0, 0
        self.is_generating = self.is_finished = self.is_aborted = False
        self.output: list[int] = []
        self.num_iterations = 0
        self.device_tokens: list[int] = list(prompt)       # what the device knows: true tokens ..
        self.device_drafts: list[int] = []                 # .. and what it will verify

    def get_tokens(self, beam: int) -> list[int]:
        assert beam == 0
        return [*self.prompt, *self.output]

    def take(self, tokens: list[int]) -> None:
        """The sampler's news: what lies beyond the end is dropped."""
        self.num_iterations += 1
        kept = tokens[: self.max_tokens - len(self.output)]
        reason = None
        for i, token in enumerate(kept):
            if token in self.end_ids:
                kept, reason = kept[: i + 1], "stop"
                break
        self.output += kept
        if reason is None and len(self.output) >= self.max_tokens:
            reason = "length"
        if self.is_aborted:
            reason = "cancelled"
        self.is_finished = reason is not None
        self.respond(kept, reason, len(self.output) / self.num_iterations)


class Batch:
    """Base of ScheduledRequests, which makes its lists."""

    @property
    def requests(self) -> list[Any]:
        return [*self.context_requests, *self.generation_requests]


class PrefixCache:
    """Blocks of prompts that were computed; a hit is not computed again, and so has no rows."""

    def __init__(self, is_on: bool) -> None:
        self._is_on, self._blocks = is_on, set[int]()

    def start_of(self, prompt: list[int]) -> int:
        """The last token is always computed: somebody has to say what follows."""
        hit = 0
        while self._is_on and hit + BLOCK <= len(prompt) - 1 and prefix_hash(prompt[: hit + BLOCK]) in self._blocks:
            hit += BLOCK
        return hit

    def keep(self, prompt: list[int]) -> None:
        self._blocks |= {prefix_hash(prompt[:stop]) for stop in range(BLOCK, len(prompt) + 1, BLOCK)}


def schedule(batch: Any, waiting: list[Any], active: list[Any], cache: PrefixCache, max_batch: int, max_tokens: int, draft_length: int,
             is_chunked: bool) -> Any:
    """Fill `batch`: those that generate, then as many prompts, or chunks of prompts, as the token budget takes."""
    batch.generation_requests = [request for request in active if request.is_generating and not request.is_finished]
    budget = max_tokens - len(batch.generation_requests) * (1 + draft_length)
    for request in [r for r in active if not r.is_generating]:
        budget -= _chunk(batch, request, budget, is_chunked)
    while waiting and len(active) < max_batch:
        request = waiting[0]
        request.context_current_position = cache.start_of(request.prompt)
        taken = _chunk(batch, request, budget, is_chunked)
        if not taken:
            break
        budget -= taken
        active.append(waiting.pop(0))
    return batch


def _chunk(batch: Any, request: Any, budget: int, is_chunked: bool) -> int:
    rest = len(request.prompt) - request.context_current_position
    size = min(rest, max(budget, 0)) if is_chunked else rest if rest <= budget else 0
    if size:
        request.context_chunk_size = size
        batch.context_requests.append(request)
    return size
