"""Streaming clients that never stop, and how long nobody got a token. Knows the HTTP client; kills nothing."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from dataclasses import dataclass

from tests.clients import Clients
from tests.helpers import ask
from tide_pipeline.serve.client import TritonClient

PROMPTS = ("hello world", "abc abc abc", "the quick brown fox", "zyxw")


@dataclass(frozen=True)
class Failure:
    """A request without an answer: when it was sent, when it broke off, whether a token had come."""

    sent: float
    ended: float
    had_begun: bool
    error: str


class Load(Clients):
    """`with Load(client) as load:` asks for greedy answers, streamed. Times are monotonic seconds."""

    def __init__(self, client: TritonClient, clients: int = 3, tokens: int = 48, speculation: str = "auto", name: str = "load") -> None:
        self._client, self._tokens, self._speculation, self._name = client, tokens, speculation, name
        self.texts: dict[str, Counter[str]] = {prompt: Counter() for prompt in PROMPTS}
        self.answered: list[tuple[float, float]] = []      # sent, ended
        self.pieces: list[float] = []                      # when each step's text came
        self.failures: list[Failure] = []
        self.versions: Counter[str] = Counter()
        super().__init__(clients)

    def gap_s(self, since: float, until: float) -> float:
        """The longest time without a token for anybody."""
        times = [since, *(at for at in self.pieces if since <= at <= until), until]
        return max(after - before for before, after in itertools.pairwise(times))

    def broken(self, killed_at: float) -> tuple[int, int]:
        """Failed requests that were being served when the kill came, and those sent after it."""
        return (sum(f.sent <= killed_at for f in self.failures), sum(f.sent > killed_at for f in self.failures))

    def assert_same_answers(self) -> None:
        """Greedy: whatever was killed, and whichever draft served, the text is one."""
        assert all(len(texts) <= 1 for texts in self.texts.values()), self.texts

    def ask(self, client: int) -> None:
        for i in range(1_000_000):
            if self.stopped.is_set():
                return
            prompt, sent, begun = PROMPTS[i % len(PROMPTS)], time.monotonic(), False
            request = ask(f"{self._name}-{client}-{i}-{sent:.6f}", prompt, speculation=self._speculation, max_tokens=self._tokens,
                          ignore_eos=True, deadline_s=60.0)
            text = ""
            try:
                with self._client.stream(request) as stream:
                    for piece in stream:
                        begun = True
                        text += piece
                        self.pieces.append(time.monotonic())
                    assert stream.result is not None
                    self.versions[stream.result.draft_version] += 1
            except Exception as error:
                self.failures.append(Failure(sent, time.monotonic(), begun, f"{type(error).__name__}: {error}"))
                self.stopped.wait(0.1)
                continue
            self.texts[prompt][text] += 1
            self.answered.append((sent, time.monotonic()))
