"""Passes of fixed shape over one KV cache, which a GPU replays as graphs. Knows no network but the function it is given.

    bucket (batch 4, rows 8, context 256)         a step of 3 requests with 1, 3 and 1 rows in it:
    rows        a0 b0 b1 b2 c0 .  .  .            spare rows write to the cache's scratch row, and nobody reads what they give
    rectangle   [4, widest step]                  attention's queries; spare slots repeat row 0
    context     256 positions                     the mask hides those past each row's own

A step of N rows fills the first places of its bucket's buffers, in one copy from the host. What runs on them is the very pass that runs
without buckets; it allocates nothing whose size depends on values and reads none back, so a graph can replay it. Without `graphs` it
runs eagerly, the same on every device. A bucket is captured when it first comes up; the graphs of a cache share one pool of memory, as
no two of them run at once, and the least recently used ones go first.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tide_pipeline.models.geometry import StepRows, rectangle
from tide_pipeline.models.layers import Heads, KVCache

log = logging.getLogger(__name__)

CONTEXT_BITS = 8                  # contexts are rounded up to whole steps of 256, or of a quarter of their size where that is more
LIMIT = 256                       # buckets kept for a cache
ALIGNED = 8                       # positions: kernels that take a mask want its rows so

Outputs = tuple[Tensor, ...]
Body = Callable[..., Outputs]     # (cache, rows, ids [N], *states [N, ..]) -> outputs [N, ..], all on the device


@dataclass(frozen=True, slots=True)
class Bucket:
    """Steps of at most `batch` requests and `rows` rows that look back on at most `context` positions. rows == batch: one row each."""

    batch: int
    rows: int
    context: int

    @staticmethod
    def of(widths: Sequence[int], context: int, slots: int, positions: int) -> Bucket:
        """The smallest of the grid: batches by powers of two, rows by whole batches. Never beyond the cache."""
        batch, N = min(slots, 1 << (len(widths) - 1).bit_length()), sum(widths)
        rows = batch if max(widths) == 1 and len(widths) == N else batch * max(2, -(-N // batch))
        step = 1 << max(CONTEXT_BITS, context.bit_length() - 3)
        return Bucket(batch, rows, min(positions, -(-context // step) * step))


class Replay(Protocol):
    """A captured pass; torch.cuda.CUDAGraph is one."""

    def replay(self) -> None: ...


class Graphs(Protocol):
    """Captures what a function does on the device; its outputs are written anew by every replay."""

    def capture(self, run: Callable[[], Outputs]) -> tuple[Replay, Outputs]: ...


class CudaGraphs:
    """CUDA graphs in one memory pool. Has not been run on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(self, run: Callable[[], Outputs]) -> tuple[Replay, Outputs]:
        """Other threads may go on using the device: a draft may be loaded meanwhile."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            outputs = run()
        return graph, outputs


class StaticPass:
    """The buffers of one bucket, and its graph once there is one."""

    def __init__(self, bucket: Bucket, max_width: int, states: Sequence[Tensor], cache: KVCache) -> None:
        width = 1 if bucket.rows == bucket.batch else max_width
        self._sizes = [bucket.rows] * 3 + ([bucket.rows, bucket.batch * width] if width > 1 else [])
        self._device, self._width, self._scratch, self._positions = cache.rows.device, width, cache.scratch, cache.positions
        self._index = self._padded([], torch.empty(0), torch.empty(0)).to(self._device)
        self._states = [torch.zeros(bucket.rows, *state.shape[1:], device=self._device, dtype=state.dtype) for state in states]
        self._ids, positions, cache_rows, *attention = torch.split(self._index, self._sizes)
        unpad, pad = attention or (None, None)
        self._rows = StepRows(0, bucket.batch, width, bucket.context, True, positions, cache_rows, pad, unpad)
        self._graph: Replay | None = None
        self._outputs: Outputs = ()

    def fill(self, ids_N: Tensor, positions_N: Tensor, widths: Sequence[int], states: Sequence[Tensor]) -> None:
        """A step's rows into the first places."""
        self._index.copy_(self._padded(widths, ids_N, positions_N), non_blocking=True)
        for buffer, state_N in zip(self._states, states, strict=True):
            buffer[: len(state_N)].copy_(state_N)

    def run(self, body: Body, cache: KVCache) -> Outputs:
        """Outputs of all rows, good until the next pass over this cache."""
        if self._graph is None:
            return body(cache, self._rows, self._ids, *self._states)
        self._graph.replay()
        return self._outputs

    def capture(self, body: Body, cache: KVCache, graphs: Graphs) -> None:
        """Once the pass has run: libraries set themselves up at their first call, which no graph may hold."""
        if self._graph is None:
            self._graph, self._outputs = graphs.capture(lambda: body(cache, self._rows, self._ids, *self._states))

    def _padded(self, widths: Sequence[int], ids_N: Tensor, positions_N: Tensor) -> Tensor:
        """All index tensors of a step in one, on the host."""
        host = torch.zeros(sum(self._sizes), dtype=torch.long, pin_memory=self._device.type == "cuda")
        ids, positions, cache_rows, *attention = torch.split(host, self._sizes)
        cache_rows.fill_(self._scratch)
        if not widths:
            return host
        N, widths_B = len(ids_N), torch.tensor(widths)
        ids[:N], positions[:N] = ids_N, positions_N
        torch.add(torch.arange(len(widths)).repeat_interleave(widths_B, output_size=N) * self._positions, positions_N, out=cache_rows[:N])
        if attention:
            places, occupied = rectangle(widths_B, self._width)
            attention[0][:N], attention[1][: len(places)] = occupied, places
        return host


class StaticPasses:
    """The buckets of one cache. `body` is the pass; steps of up to `max_width` rows a request are taken."""

    def __init__(self, body: Body, max_width: int, graphs: Graphs | None = None, limit: int = LIMIT) -> None:
        self._body, self._max_width, self._graphs, self._limit = body, max_width, graphs, limit
        self._passes: OrderedDict[Bucket, StaticPass] = OrderedDict()

    @property
    def buckets(self) -> list[Bucket]:
        """From the one that has waited longest for its next use."""
        return list(self._passes)

    def takes(self, widths: Sequence[int], first_slot: int) -> bool:
        """False for prompt chunks and long catch-ups: they are wide enough to keep a device busy as they are."""
        return first_slot == 0 and max(widths) <= self._max_width

    @torch.inference_mode()
    def run(self, cache: KVCache, ids_N: Tensor, positions_N: Tensor, widths: Sequence[int], *states: Tensor) -> Outputs:
        """Ids and positions from the host, states on the device. Outputs [N, ..] are the caller's."""
        bucket = Bucket.of(widths, int(positions_N.max()) + 1, cache.slots, cache.positions)
        step = self._pass(bucket, cache, states)
        step.fill(ids_N, positions_N, widths, states)
        outputs = tuple(output[: len(ids_N)].clone() for output in step.run(self._body, cache))
        self._capture(step, cache)
        return outputs

    @torch.inference_mode()
    def warm(self, cache: KVCache, batch: int, context: int) -> None:
        """Run every bucket up to these once, so that no request has to wait for a capture. Writes nothing but scratch; takes no states."""
        steps = range(1 << CONTEXT_BITS, context + (1 << CONTEXT_BITS), 1 << CONTEXT_BITS)
        grid = {Bucket.of([width] * B, min(T, cache.positions), cache.slots, cache.positions)
                for T in steps for B in range(1, batch + 1) for width in range(1, self._max_width + 1)}
        for bucket in sorted(grid - self._passes.keys(), key=lambda bucket: bucket.context)[: self._limit]:
            step = self._pass(bucket, cache, ())
            step.run(self._body, cache)
            self._capture(step, cache)

    def _capture(self, step: StaticPass, cache: KVCache) -> None:
        """Without graphs steps are slower, and as right."""
        if self._graphs is None:
            return
        try:
            step.capture(self._body, cache, self._graphs)
        except RuntimeError:
            log.exception("a pass could not be captured as a CUDA graph: serving goes on without new graphs, more slowly")
            self._graphs = None

    def _pass(self, bucket: Bucket, cache: KVCache, states: Sequence[Tensor]) -> StaticPass:
        step = self._passes.get(bucket)
        if step is None:
            if len(self._passes) >= self._limit:
                self._passes.popitem(last=False)
            step = self._passes[bucket] = StaticPass(bucket, self._max_width, states, cache)
        self._passes.move_to_end(bucket)
        return step


def new_cache(body: Body, layers: int, slots: int, positions: int, heads: Heads, like: Tensor, max_width: int) -> KVCache:
    """On the device and in the dtype of `like`; on a GPU with passes of fixed shape."""
    if like.device.type != "cuda":
        return KVCache(layers, slots, positions, heads, like.device, like.dtype)
    cache = KVCache(layers, slots, positions + -positions % ALIGNED, heads, like.device, like.dtype)
    cache.static = StaticPasses(body, max_width, CudaGraphs(like.device))
    return cache
