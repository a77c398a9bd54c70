"""Traffic that changes its domain on command and remembers what became of every request. Knows the HTTP client, not who answers.

A request that was refused before it ran (nobody listens, or 503) is sent again, as any client does that is told to: that is a refusal, and
counted. One that was accepted and not answered is a failure, and is not sent again.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle

from tide_pipeline.contracts import GenerationRequest, SamplingParams
from tide_pipeline.errors import EngineClosed, QueueFull, TideError
from tide_pipeline.serve.client import TritonClient
from tide_pipeline.workloads.prompts import Prompt

MAX_TOKENS = 96
SAMPLED_EVERY = 4                  # prompts at temperature 0.8; the others are greedy
AGAIN_AFTER_S = 0.5
GIVES_UP_S = 120.0                 # a request that was refused for so long has failed


@dataclass(frozen=True)
class Lost:
    """A refusal, or a failure. Times are Unix seconds."""

    sent_at: float
    ended_at: float
    domain: str
    error: str


@dataclass
class Tally:
    """What became of the requests so far."""

    finished: int = 0
    tokens: int = 0
    refused: list[Lost] = field(default_factory=list)
    failed: list[Lost] = field(default_factory=list)
    first_sent: dict[int, float] = field(default_factory=dict)     # number of the turn -> its first request was sent


class Traffic:
    """`concurrency` threads, each with one request in flight."""

    def __init__(self, client: TritonClient, prompts: Mapping[str, Sequence[Prompt]], concurrency: int) -> None:
        self.tally = Tally()
        self._client = client
        self._prompts: dict[str, Iterator[Prompt]] = {domain: cycle(_some_sampled(found)) for domain, found in prompts.items()}
        self._lock, self._over = threading.Lock(), threading.Event()
        self._turn, self._domain, self._sent = -1, "", 0
        self._threads = [threading.Thread(target=self._run, name=f"soak-{i}", daemon=True) for i in range(concurrency)]

    def turn_to(self, turn: int, domain: str) -> None:
        """From the next request on."""
        with self._lock:
            self._turn, self._domain = turn, domain
        if turn == 0:
            for thread in self._threads:
                thread.start()

    def stop(self) -> Tally:
        """Nothing more is sent; what is in flight is waited for."""
        self._over.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(GIVES_UP_S)
        return self.tally

    def _run(self) -> None:
        while not self._over.is_set():
            with self._lock:
                self._sent += 1
                turn, domain, number = self._turn, self._domain, self._sent
                prompt = next(self._prompts[domain])
            self._ask(turn, domain, prompt, number)

    def _ask(self, turn: int, domain: str, prompt: Prompt, number: int) -> None:
        sampling = SamplingParams(MAX_TOKENS, prompt.temperature or 0.0, seed=number)
        began = time.time()
        while True:
            sent_at = time.time()
            with self._lock:
                self.tally.first_sent.setdefault(turn, sent_at)
            try:
                result = self._client.generate(GenerationRequest(f"soak-{uuid.uuid4().hex[:12]}", prompt.text, sampling))
            except TideError as error:
                lost = Lost(sent_at, time.time(), domain, f"{type(error).__name__}: {error}"[:160])
                if not self._is_again(error, began):
                    with self._lock:
                        self.tally.failed.append(lost)
                    self._over.wait(AGAIN_AFTER_S)
                    return
                with self._lock:
                    self.tally.refused.append(lost)
                self._over.wait(AGAIN_AFTER_S)
                continue
            with self._lock:
                self.tally.finished += 1
                self.tally.tokens += result.num_output_tokens
            return

    def _is_again(self, error: TideError, began: float) -> bool:
        if self._over.is_set() or time.time() - began > GIVES_UP_S:
            return False
        return isinstance(error, EngineClosed | QueueFull) or isinstance(error.__cause__, ConnectionRefusedError)


def _some_sampled(prompts: Sequence[Prompt]) -> list[Prompt]:
    return [replace(p, temperature=0.8 if i % SAMPLED_EVERY == SAMPLED_EVERY - 1 else 0.0) for i, p in enumerate(prompts)]
