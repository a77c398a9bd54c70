"""What an engine and a sink promise each other and their callers. Knows no engine."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tide_pipeline.contracts import EngineBuild, GenerationRequest, RequestClosed, RequestOpened, StepEvent, TokenChunk
from tide_pipeline.engine.taps import TapRing

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot; counters run since start."""

    engine_digest: str
    running: int
    waiting: int
    kv_tokens_used: int
    kv_tokens_total: int
    requests_finished: int
    requests_failed: int
    tokens_out: int
    prompt_tokens: int
    target_steps: int                   # request-steps of decode, verify and probe
    verify_steps: int                   # request-steps that verified draft tokens
    drafted_tokens: int
    accepted_tokens: int
    speculation_on_s: float
    speculation_off_s: float
    probe_s: float
    sink_errors: int
    drafts: dict[str, str]              # workload tag -> draft version
    draft_length_steps: dict[int, int]  # draft length -> engine steps that used it
    first_position_rate: dict[str, float] = field(default_factory=dict)   # workload -> the controller's estimate
    step_ms: dict[str, float] = field(default_factory=dict)               # measured costs, StepCosts.table()
    dropped_tap_rows: int = 0                                             # the tap ring was full: the sink lagged behind a GPU
    capture_faults: int = 0                                               # why states are not captured: the server is not as known


class Sink(Protocol):
    """Takes the engine's events. Must not block; the engine swallows and counts what it raises.

    Order per request: one `on_open`, `on_step` once per step, one `on_close`. All calls come from the engine's thread; on a GPU they come
    some steps late, when a step's states have been copied to the host.
    """

    def attach(self, ring: TapRing, engine_digest: str) -> None: ...

    def on_open(self, opened: RequestOpened) -> None: ...

    def on_step(self, events: Sequence[StepEvent]) -> None: ...

    def on_close(self, closed: RequestClosed) -> None: ...

    def on_idle(self) -> None:
        """No request runs or waits: time for what was put off."""
        ...

    def close(self) -> None: ...


class NullSink:
    """Takes everything and keeps nothing."""

    def attach(self, ring: TapRing, engine_digest: str) -> None: ...

    def on_open(self, opened: RequestOpened) -> None: ...

    def on_step(self, events: Sequence[StepEvent]) -> None: ...

    def on_close(self, closed: RequestClosed) -> None: ...

    def on_idle(self) -> None: ...

    def close(self) -> None: ...


def told(call: Callable[[], None]) -> bool:
    """Make a call to a sink. False: it raised, and is to be replaced by a NullSink."""
    try:
        call()
    except Exception as error:                     # its text could quote a prompt
        log.error("the capture sink failed (%s): it is switched off, serving goes on without capture", type(error).__name__)
        return False
    return True


class TokenStream:
    """The answer to one request: iterate for its chunks, or give `on_chunk` to be called from the engine's thread."""

    def __init__(self, request_id: str, cancel: Callable[[str], None], on_chunk: Callable[[TokenChunk], None] | None = None) -> None:
        self.request_id = request_id
        self._cancel = cancel
        self._on_chunk = on_chunk
        self._chunks: queue.SimpleQueue[TokenChunk] = queue.SimpleQueue()

    def put(self, chunk: TokenChunk) -> None:
        if self._on_chunk is not None:
            self._on_chunk(chunk)
        else:
            self._chunks.put(chunk)

    def cancel(self) -> None:
        """Frees the request's slot at the next step; the stream then ends with finish reason "cancelled"."""
        self._cancel(self.request_id)

    def __iter__(self) -> Iterator[TokenChunk]:
        while True:
            chunk = self._chunks.get()
            yield chunk
            if chunk.finish_reason is not None:
                return


class Engine(Protocol):
    """A serving engine: embedded (PyTorch) or trtllm."""

    def submit(self, request: GenerationRequest, on_chunk: Callable[[TokenChunk], None] | None = None) -> TokenStream:
        """Queue a request. Raises InvalidRequest, PromptTooLong, QueueFull, EngineClosed."""
        ...

    def set_drafts(self, drafts: Mapping[str, EngineBuild]) -> None:
        """Serve these drafts from the next request on; requests in flight keep the draft they began with.

        Loads and verifies before anything changes. Raises BuildError, CheckpointError, EngineMismatch.
        """
        ...

    def profile(self) -> None:
        """Measure what steps cost, before `start`, where the engine decides draft lengths itself."""
        ...

    def start(self) -> None:
        """Serve. Returns when requests can be answered."""
        ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None:
        """Stop after the requests in flight were told "cancelled"."""
        ...
