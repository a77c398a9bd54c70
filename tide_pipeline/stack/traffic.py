"""Closed-loop traffic over HTTP: a fixed number of requests in flight. Knows the client; not who listens."""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tide_pipeline.contracts import GenerationRequest, SamplingParams
from tide_pipeline.errors import TideError
from tide_pipeline.serve.client import GenerationResult, TritonClient
from tide_pipeline.workloads.prompts import Prompt


@dataclass(frozen=True)
class TrafficDefaults:
    """What a request gets where its prompt line does not say."""

    max_tokens: int = 96
    temperature: float = 0.0
    speculation: str = "auto"
    workload: str = "default"
    tenant: str = "default"


@dataclass(frozen=True)
class TrafficStats:
    """Totals since start; `tokens_per_s` and `acceptance_length` over the last few seconds of finished requests."""

    sent: int
    finished: int
    failed: int
    output_tokens: int
    tokens_per_s: float
    acceptance_length: float
    last_error: str


class Traffic:
    """`concurrency` threads that each send the next prompt when their last was answered."""

    def __init__(self, client: TritonClient, prompts: Iterable[Prompt], concurrency: int, defaults: TrafficDefaults,
                 window_s: float = 5.0) -> None:
        self._client, self._defaults, self._window_s = client, defaults, window_s
        self._prompts: Iterator[Prompt] = iter(prompts)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._sent = self._failed = self._tokens = self._finished = 0
        self._recent: deque[tuple[float, GenerationResult]] = deque()
        self._last_error = ""
        self._threads = [threading.Thread(target=self._run, name=f"traffic-{i}", daemon=True) for i in range(concurrency)]

    def start(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> TrafficStats:
        """Send nothing more, wait for the answers in flight."""
        self._stop.set()
        return self.join()

    def join(self) -> TrafficStats:
        """Until every prompt was answered."""
        for thread in self._threads:
            thread.join()
        return self.stats()

    @property
    def running(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def stats(self) -> TrafficStats:
        with self._lock:
            now = time.monotonic()
            while self._recent and now - self._recent[0][0] > self._window_s:
                self._recent.popleft()
            results = [r for _, r in self._recent]
            steps = sum(r.verify_steps for r in results)
            return TrafficStats(self._sent, self._finished, self._failed, self._tokens,
                                sum(r.num_output_tokens for r in results) / self._window_s,
                                1.0 + sum(r.accepted for r in results) / steps if steps else 0.0, self._last_error)

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                prompt = next(self._prompts, None)
                self._sent += prompt is not None
            if prompt is None:
                return
            try:
                result = self._client.generate(self._request(prompt))
            except TideError as error:
                with self._lock:
                    self._failed += 1
                    self._last_error = str(error)
                time.sleep(0.2)
                continue
            with self._lock:
                self._finished += 1
                self._tokens += result.num_output_tokens
                self._recent.append((time.monotonic(), result))

    def _request(self, prompt: Prompt) -> GenerationRequest:
        d = self._defaults
        sampling = SamplingParams(prompt.max_tokens or d.max_tokens,
                                  d.temperature if prompt.temperature is None else prompt.temperature, seed=self._sent)
        return GenerationRequest(f"t-{uuid.uuid4().hex[:12]}", prompt.text, sampling, d.speculation, prompt.workload or d.workload,
                                 prompt.tenant or d.tenant)
