"""The LLM class of the stand-in: arguments are held against the generated classes, then a server thread starts."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .network import Network
from .outputs import StreamedOutput
from .server import Executor, extensions, travelled

NESTED = {"kv_cache_config": ["KvCacheConfig"], "cuda_graph_config": ["CudaGraphConfig"],
          "speculative_config": ["Eagle3DecodingConfig", "EagleDecodingConfig"]}       # the first that the line has


class Server:
    """Base of LLM."""

    def __init__(self, model: str, **given: Any) -> None:
        from tensorrt_llm.llmapi import llm_args

        for name, kinds in NESTED.items():
            if isinstance(given.get(name), dict):
                kind = next(kind for kind in kinds if hasattr(llm_args, kind))
                given[name] = getattr(llm_args, kind)(**given[name])
        given.setdefault("kv_cache_config", llm_args.KvCacheConfig())
        given.setdefault("cuda_graph_config", llm_args.CudaGraphConfig())
        given.setdefault("max_batch_size", 2048)                   # a validator of 1.2, the default of later lines
        self.args = llm_args.TorchLlmArgs(model=model, **given)
        self._ids = itertools.count(1)
        self._network = Network.of(str(model))
        self.tokenizer = self._load_tokenizer()
        self._engine = Executor(self.args, self._network)
        is_single = os.environ.get("TLLM_WORKER_USE_SINGLE_PROCESS") == "1"
        self._executor = SimpleNamespace(engine=self._engine) if is_single else SimpleNamespace()
        worker, ranks = self.args.ray_worker_extension_cls, self.args.tensor_parallel_size
        self._workers = extensions(worker, self._engine, ranks) if worker else []

    def _load_tokenizer(self) -> Any:
        file = Path(self.args.model) / "tokenizer.json"
        if self.args.skip_tokenizer_init or not file.is_file():
            return None
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(file))

    def generate_async(self, inputs: Any, sampling_params: Any = None, streaming: bool = False, **_: Any) -> Any:
        from tensorrt_llm.llmapi import CompletionOutput, RequestOutput
        from tensorrt_llm.sampling_params import SamplingParams

        params = sampling_params or SamplingParams()
        prompt, ids = self._read(inputs)
        self._check(ids, params)
        client_id, request = next(self._ids), None
        output = RequestOutput(client_id, prompt, ids, CompletionOutput(index=0), streaming, self._decode, lambda: self._abort(request))
        request = self._engine.submit(client_id, ids, params.max_tokens, self._ends(params), output.put)
        return output

    def _read(self, inputs: Any) -> tuple[str | None, list[int]]:
        if isinstance(inputs, dict):
            inputs = inputs.get("prompt_token_ids", inputs.get("prompt"))
        if isinstance(inputs, str):
            if self.tokenizer is None:
                raise ValueError("tokenizer is required to tokenize string prompt")
            return inputs, list(self.tokenizer.encode(inputs).ids)
        return None, list(inputs)

    def _check(self, ids: list[int], params: Any) -> None:
        longest = self.args.max_seq_len or 1 << 30
        if not ids or len(ids) + params.max_tokens > longest:
            raise ValueError(f"The sum of prompt length ({len(ids)}) and max_tokens ({params.max_tokens}) should not exceed "
                             f"max_seq_len ({longest})")
        if len(ids) > self.args.max_num_tokens and not self.args.enable_chunked_prefill:
            raise ValueError(f"prompt length ({len(ids)}) should not exceed max_num_tokens ({self.args.max_num_tokens})")

    def _ends(self, params: Any) -> tuple[int, ...]:
        end = params.end_id if params.end_id is not None else self._network.eos_id
        own = () if params.ignore_eos or end is None else (end,)
        return (*own, *(params.stop_token_ids or ()))

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids)) if self.tokenizer is not None else ""

    @staticmethod
    def _abort(request: Any) -> None:
        if request is not None:
            request.is_aborted = True

    def get_stats_async(self, timeout: float | None = 2) -> AsyncIterator[dict[str, Any]]:
        return self._stats(timeout)

    async def _stats(self, timeout: float | None) -> AsyncIterator[dict[str, Any]]:
        """What came since the last time; ends when nothing came for `timeout` seconds."""
        waited = 0.0
        while waited <= (timeout or 0.0):
            while self._engine.iterations:
                waited = 0.0
                yield self._engine.iterations.pop(0)
            await asyncio.sleep(0.01)
            waited += 0.01

    def collective_rpc(self, method: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None,
                       unique_reply_rank: int | None = None) -> list[Any]:
        """On every rank; what goes in and comes out travels between processes."""
        if self.args.orchestrator_type != "ray" or not self._workers:
            raise ValueError("Executor type does not support collective RPC")
        replies = [travelled(getattr(worker, method)(*travelled(args), **travelled(kwargs or {}))) for worker in self._workers]
        return replies if unique_reply_rank is None else [replies[unique_reply_rank]]

    def shutdown(self) -> None:
        self._engine.shutdown()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


__all__ = ["Server", "StreamedOutput"]
