"""The one private mechanism: what a forward pass of TensorRT-LLM leaves behind is copied away before the next one runs.

    prepare() of the spec metadata      tells which buffer the coming pass writes (a CUDA graph's own, or one of all), and whose rows it has
    forward() of the model engine       on return the states are in that buffer, the tokens in its result, all on the caller's stream

Both are wrapped in their classes. Nothing of the server is changed, and its own errors pass through. It fails open: at the first thing
that is not as the table of facts says, capture ends with one warning and a count, and the server goes on as if it were not there.
Decoding is layout.py's, copying is shipment.py's. Has not been run on a GPU, nor with NVIDIA's own code.
"""

from __future__ import annotations

import functools
import inspect
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tide_pipeline.engine.trtllm.facts import Table
from tide_pipeline.engine.trtllm.installed import symbol
from tide_pipeline.engine.trtllm.layout import Context, Forward
from tide_pipeline.engine.trtllm.shipment import Shipment, Shipper

log = logging.getLogger(__name__)

DUMMY = -1                             # a row of the batch that no client asked for
ENGINE, METADATA = "PyTorchModelEngine", "Eagle3OneModelSpecMetadata"
RESULTS = ("new_tokens", "new_tokens_lens", "next_draft_tokens")


class Listener(Protocol):
    """Called in the server's thread; must not block."""

    def on_pass(self, forward: Forward, shipment: Shipment, began: float) -> None: ...

    def on_broken(self, why: str) -> None:
        """Capture has ended."""
        ...


@dataclass(frozen=True, slots=True)
class Batch:
    """What was scheduled, read before the pass moves it on. Keys are the server's own request ids."""

    contexts: Mapping[int, Context]
    generations: Mapping[int, int]     # to the number that the client's side knows


@dataclass(frozen=True, slots=True)
class Prepared:
    """What prepare() has told of the coming pass."""

    metadata: Any
    request_ids: Sequence[int]         # rows' order, padding included
    draft_length: int


class PassTap:
    """`install()` once per process, before or after LLM is built; `is_on` from when requests may come until it breaks or ends."""

    def __init__(self, table: Table, shipper: Shipper, listener: Listener, num_taps: int) -> None:
        self._table, self._shipper, self._listener, self._num_taps = table, shipper, listener, num_taps
        self.is_on = False             # warm-up passes are nobody's
        self.faults = 0
        self._prepared: Prepared | None = None
        self._undo: list[Callable[[], None]] = []

    def install(self) -> None:
        for name, method, wrapper in ((METADATA, "prepare", self._around_prepare), (ENGINE, "forward", self._around_forward)):
            self._undo.append(_wrap(symbol(self._table[f"{name}.{method}"]), method, wrapper))

    def remove(self) -> None:
        """As if it had never been there."""
        self.is_on = False
        while self._undo:
            self._undo.pop()()

    def broken(self, why: str) -> None:
        """Ends capture for good; serving goes on."""
        if self.is_on:
            self.is_on, self.faults = False, self.faults + 1
            log.warning("capture on TensorRT-LLM %s is off from here on, serving goes on without it: %s", self._table.line, why)
            self._listener.on_broken(why)

    def _around_prepare(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def prepare(metadata: Any) -> Any:
            result = original(metadata)
            if self.is_on:
                self._guard(lambda: self._on_prepare(metadata))
            return result

        return prepare

    def _around_forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward(engine: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.is_on or getattr(engine, "is_draft_model", False):
                return original(engine, *args, **kwargs)
            began, self._prepared = time.perf_counter(), None
            batch = self._guard(lambda: read_batch(args[0] if args else _first_named(original, kwargs)))
            outputs = original(engine, *args, **kwargs)
            if batch is not None and (batch.contexts or batch.generations):
                self._guard(lambda: self._on_return(batch, outputs, began))
            return outputs

        return forward

    def _on_prepare(self, metadata: Any) -> None:
        self._prepared = Prepared(metadata, tuple(metadata.request_ids), int(getattr(metadata, self._table.layout.draft_length)))

    def _on_return(self, batch: Batch, outputs: Any, began: float) -> None:
        prepared = self._prepared
        if prepared is None:
            raise ValueError("a pass without speculation: its tokens are unknown here (is the draft length 0 in a schedule?)")
        forward = arrange(batch, prepared)
        states: Tensor = prepared.metadata.hidden_states
        if states.dtype is not torch.bfloat16 or states.shape[1] != self._num_taps * prepared.metadata.hidden_size:
            raise ValueError(f"hidden states are {states.dtype} of width {states.shape[1]}: expected bf16, {self._num_taps} layers of "
                             f"{prepared.metadata.hidden_size}")
        if forward.num_rows > len(states):
            raise ValueError(f"{forward.num_rows} rows, and a buffer of {len(states)}")
        self._listener.on_pass(forward, self._shipper.ship(states[: forward.num_rows], [outputs[name] for name in RESULTS]), began)

    def _guard(self, call: Callable[[], Any]) -> Any:
        if not self.is_on:
            return None
        try:
            return call()
        except Exception as error:                                 # its text is ours or NVIDIA's, not a prompt's
            self.broken(f"{type(error).__name__}: {error}")
            return None


def read_batch(scheduled: Any) -> Batch:
    """From NVIDIA's scheduled requests, real ones only."""
    contexts = {}
    for request in scheduled.context_requests:
        if not request.is_dummy:
            tokens, start = request.get_tokens(0), request.context_current_position
            stop = start + request.context_chunk_size
            contexts[request.py_request_id] = Context(request.py_client_id, start, tuple(tokens[start:stop]), stop >= len(tokens))
    return Batch(contexts, {r.py_request_id: r.py_client_id for r in scheduled.generation_requests if not r.is_dummy})


def arrange(batch: Batch, prepared: Prepared) -> Forward:
    """The pass in the order of its rows. Raises ValueError where contexts do not come first, or a request has no rows."""
    ids, num_contexts = prepared.request_ids, len(batch.contexts)
    if set(ids[:num_contexts]) != batch.contexts.keys() or not batch.generations.keys() <= set(ids[num_contexts:]):
        raise ValueError("the rows of the pass are not in the order: contexts, generations, padding")
    generations = [batch.generations.get(i, DUMMY) for i in ids[num_contexts:]]
    while generations and generations[-1] == DUMMY:
        generations.pop()
    return Forward(tuple(batch.contexts[i] for i in ids[:num_contexts]), tuple(generations), prepared.draft_length)


def _first_named(method: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """What a method gets first, its name being another in every line."""
    return given[list(inspect.signature(method).parameters)[1]]


def _wrap(owner: type, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Callable[[], None]:
    """Replace a method of a class; what is returned puts it back, inherited or its own."""
    original, was_own = getattr(owner, name), name in vars(owner)
    setattr(owner, name, around(original))

    def undo() -> None:
        if was_own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)

    return undo
