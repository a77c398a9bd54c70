"""What a client of the stand-in holds: an output that grows while its stream is read. Knows no server but the request's abort."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Any


class StreamedOutput:
    """Base of GenerationResultBase and RequestOutput: `async for` yields itself, longer each time; `result()` waits for the end."""

    def __init__(self, request_id: int, prompt: str | None, prompt_token_ids: list[int], output: Any, streaming: bool,
                 decode: Callable[[list[int]], str], abort: Callable[[], None]) -> None:
        self.request_id, self.prompt, self.prompt_token_ids = request_id, prompt, prompt_token_ids
        self.outputs, self.finished, self.avg_decoded_tokens_per_iter = [output], False, None
        self._streaming, self._decode, self._abort = streaming, decode, abort
        self._is_aborted = False
        self._news: deque[tuple[list[int], str | None, float] | Exception] = deque()
        self._arrived = threading.Condition()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def put(self, tokens: list[int], reason: str | None, average: float) -> None:
        """From the server's thread."""
        self._put((tokens, reason, average))

    def fail(self, error: Exception) -> None:
        self._put(error)

    def _put(self, news: Any) -> None:
        with self._arrived:
            self._news.append(news)
            self._arrived.notify_all()
            if self._waiter is not None:
                loop, event = self._waiter
                loop.call_soon_threadsafe(event.set)

    def _take(self, news: Any) -> None:
        if isinstance(news, Exception):
            raise news
        tokens, reason, self.avg_decoded_tokens_per_iter = news
        output = self.outputs[0]
        output.token_ids = [*output.token_ids, *tokens]
        output.text = self._decode(output.token_ids)
        if reason is not None:
            output.finish_reason, self.finished = reason, True

    def __aiter__(self) -> StreamedOutput:
        return self

    async def __anext__(self) -> StreamedOutput:
        if self.finished:
            raise StopAsyncIteration
        while True:
            await self._wait()
            self._take(self._news.popleft())
            if self._streaming or self.finished:
                return self

    async def _wait(self) -> None:
        event = asyncio.Event()
        with self._arrived:
            if self._news:
                return
            self._waiter = (asyncio.get_running_loop(), event)
        await event.wait()
        with self._arrived:
            self._waiter = None

    async def aresult(self) -> StreamedOutput:
        async for _ in self:
            pass
        return self

    def result(self, timeout: float | None = None) -> StreamedOutput:
        while not self.finished:
            with self._arrived:
                if not self._arrived.wait_for(lambda: bool(self._news), timeout):
                    raise TimeoutError(f"no output within {timeout} s")
                news = self._news.popleft()
            self._take(news)
        return self

    def abort(self) -> None:
        self._is_aborted = True
        self._abort()

    def aborted(self) -> bool:
        return self._is_aborted
