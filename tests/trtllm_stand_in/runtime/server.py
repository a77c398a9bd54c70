"""The stand-in's server: a thread that schedules passes and hands out what they gave. Greedy whatever is asked; no GPU, no weights."""

from __future__ import annotations

import importlib
import itertools
import os
import threading
import time
from multiprocessing.reduction import ForkingPickler
from typing import Any

from .network import Network
from .requests import PrefixCache, schedule

IDLE_S = 0.02
PASS_S = float(os.environ.get("STAND_IN_PASS_S", "0"))         # at least: clients on a loaded machine must be in time to leave


class Executor:
    """NVIDIA's PyExecutor, as far as anybody looks into it: `model_engine`, and a loop."""

    def __init__(self, args: Any, network: Network) -> None:
        from tensorrt_llm._torch.pyexecutor.llm_request import LlmRequest
        from tensorrt_llm._torch.pyexecutor.model_engine import PyTorchModelEngine
        from tensorrt_llm._torch.pyexecutor.scheduler import ScheduledRequests

        self.args, self._request, self._batch = args, LlmRequest, ScheduledRequests
        self._ids = itertools.count(2048)                          # not the client's numbers
        self.model_engine = PyTorchModelEngine(args, network, self._dummy)
        self._cache = PrefixCache(args.kv_cache_config.enable_block_reuse)
        self._waiting: list[Any] = []
        self._active: list[Any] = []
        self._pending: list[tuple[Any, dict[str, Any]]] = []       # passes whose results the host has not seen
        self._changed = threading.Condition()
        self._is_closed = False
        self.iterations: list[dict[str, Any]] = []
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._loop, name="stand-in", daemon=True)
        self._thread.start()

    def _dummy(self) -> Any:
        request = self._request(next(self._ids), 0, [0], 1, (), lambda *_: None, is_dummy=True)
        request.device_drafts = []
        return request

    def submit(self, client_id: int, prompt: list[int], max_tokens: int, end_ids: tuple[int, ...], respond: Any) -> Any:
        request = self._request(next(self._ids), client_id, prompt, max_tokens, end_ids, respond)
        with self._changed:
            self._waiting.append(request)
            self._changed.notify()
        return request

    def reset_prefix_cache(self) -> None:
        self._cache = PrefixCache(self.args.kv_cache_config.enable_block_reuse)

    def shutdown(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(timeout=30)

    def _loop(self) -> None:
        try:
            while not self._is_closed:
                self._step()
        except Exception as error:
            self.error = error
            raise

    def _step(self) -> None:
        with self._changed:
            if not (self._waiting or self._active or self._pending):
                self._changed.wait(IDLE_S)
                return
            batch = schedule(self._batch(), self._waiting, self._active, self._cache, self.args.max_batch_size, self.args.max_num_tokens,
                             self.model_engine.runtime_draft_len, self.args.enable_chunked_prefill)
        if batch.requests:
            began = time.perf_counter()
            outputs = self.model_engine.forward(batch, self)
            time.sleep(PASS_S)
            self._pending.append((self._snapshot(batch), outputs))
            self._record((time.perf_counter() - began) * 1e3, len(batch.requests))
        # the overlap scheduler starts a pass before it has looked at the one before: ended requests run once more
        while len(self._pending) > (0 if self.args.disable_overlap_scheduler or not batch.requests else 1):
            self._hand_out(*self._pending.pop(0))

    def _snapshot(self, batch: Any) -> list[tuple[Any, bool]]:
        """Who gets which row of the results, and whether it counts: a chunk in the middle of a prompt says nothing."""
        rows = []
        for request in batch.context_requests:
            request.context_current_position += request.context_chunk_size
            request.is_generating = request.context_current_position == len(request.prompt)
            rows.append((request, request.is_generating))
            if request.is_generating:
                self._cache.keep(request.prompt)
        return rows + [(request, True) for request in batch.generation_requests]

    def _hand_out(self, rows: list[tuple[Any, bool]], outputs: dict[str, Any]) -> None:
        news = outputs["news"]
        if outputs.get("new_tokens") is not None:                  # as the sampler does: from the tensors
            lens = outputs["new_tokens_lens"].tolist()
            news = [row[:count] for row, count in zip(outputs["new_tokens"].tolist(), lens, strict=True)]
        for (request, counts), tokens in zip(rows, news, strict=False):
            if counts and not request.is_finished:
                request.take(tokens)
        with self._changed:
            self._active = [request for request in self._active if not request.is_finished]

    def _record(self, latency_ms: float, batch_size: int) -> None:
        stats, iters = self.model_engine.stats, len(self.iterations)
        entry = {"iter": iters, "iterLatencyMS": latency_ms, "numActiveRequests": batch_size}
        if self.model_engine.spec_config is not None:
            asked = stats["numRequestsWithDraftTokens"]
            entry["specDecodingStats"] = {**stats, "acceptanceLength": 1 + stats["numAcceptedTokens"] / asked if asked else 1.0,
                                          "draftOverhead": 0.0}
            self.model_engine.stats = dict.fromkeys(stats, 0)
        if self.args.enable_iter_perf_stats:
            self.iterations.append(entry)


def extensions(path: str, executor: Executor, ranks: int) -> list[Any]:
    """The worker extension "package.module.Class" on every rank; `engine` is the executor, as in NVIDIA's Ray workers. One for all here."""
    module, _, name = path.rpartition(".")
    workers = [getattr(importlib.import_module(module), name)() for _ in range(ranks)]
    for rank, worker in enumerate(workers):
        worker.engine, worker.rank = executor, rank
    return workers


def travelled(value: Any) -> Any:
    """As it arrives in another process."""
    return ForkingPickler.loads(ForkingPickler.dumps(value))
