"""Chunks of one request to the responses its client hears. Knows the tensors' names; how a response travels is a `Reply`'s business."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum
from typing import Protocol

from tide_pipeline.contracts import FinishReason, TokenChunk
from tide_pipeline.errors import EngineClosed, InvalidRequest, QueueFull
from tide_pipeline.serve.request import Asked
from tide_pipeline.serve.waits import Waits


class ErrorKind(StrEnum):
    """Names of Triton's error codes."""

    INVALID_ARG = "INVALID_ARG"
    UNAVAILABLE = "UNAVAILABLE"
    CANCELLED = "CANCELLED"
    INTERNAL = "INTERNAL"


def kind_of(error: Exception) -> ErrorKind:
    """Whose fault an exception is."""
    if isinstance(error, InvalidRequest):
        return ErrorKind.INVALID_ARG
    return ErrorKind.UNAVAILABLE if isinstance(error, QueueFull | EngineClosed) else ErrorKind.INTERNAL


class Reply(Protocol):
    """The way back to one client."""

    def send(self, outputs: dict[str, str], *, is_last: bool) -> None: ...

    def fail(self, kind: ErrorKind, message: str) -> None:
        """The last response."""
        ...

    def is_cancelled(self) -> bool:
        """Whether the client has gone."""
        ...


class Answer:
    """Called by the engine's thread with each chunk. One response per step when streaming, otherwise exactly one at the end."""

    def __init__(self, asked: Asked, reply: Reply, on_end: Callable[[str], None], waits: Waits) -> None:
        self.asked, self.reply, self._on_end, self._waits = asked, reply, on_end, waits
        self._text = ""                # so far: TensorRT-LLM's model streams the text so far too, not its last piece
        self._has_begun = False
        self.is_closing = False        # set when the engine shuts down

    def __call__(self, chunk: TokenChunk) -> None:
        self._text += chunk.text
        if chunk.token_ids and not self._has_begun:
            self._has_begun = True
            self._waits.first_token.observe(time.monotonic() - self.asked.began)
        if chunk.finish_reason is None:
            if self.asked.streaming:
                self.reply.send({"text_output": self._text}, is_last=False)
            return
        self._waits.finish(chunk.finish_reason)
        self._on_end(chunk.request_id)             # first: a client that has its answer may use the id again
        self._end(chunk)

    def _end(self, chunk: TokenChunk) -> None:
        match chunk.finish_reason:
            case FinishReason.ERROR:
                self.reply.fail(ErrorKind.INTERNAL, f"the engine failed on this request: {chunk.error}")
            case FinishReason.CANCELLED if self.is_closing:
                self.reply.fail(ErrorKind.UNAVAILABLE, "the engine is shutting down: send the request to another replica")
            case FinishReason.CANCELLED:
                self.reply.fail(ErrorKind.CANCELLED, "the request was cancelled")
            case _:
                self.reply.send(self._outputs(chunk), is_last=True)

    def _outputs(self, chunk: TokenChunk) -> dict[str, str]:
        prompt = self.asked.request.prompt if self.asked.echo and not self.asked.streaming else ""
        outputs = {"text_output": prompt + self._text}
        if self.asked.with_finish_reason:
            outputs["finish_reason"] = str(chunk.finish_reason)
        return outputs | counters(chunk) if self.asked.with_counters else outputs


def counters(chunk: TokenChunk) -> dict[str, str]:
    """Totals of a finished request. The rate is accepted / drafted tokens, 0 where nothing was drafted."""
    rate = chunk.accepted_tokens / chunk.drafted_tokens if chunk.drafted_tokens else 0.0
    return {"acceptance_rate": f"{rate:.6g}", "total_accepted_draft_tokens": str(chunk.accepted_tokens),
            "total_draft_tokens": str(chunk.drafted_tokens), "draft_version": chunk.draft_version,
            "verify_steps": str(chunk.verify_steps), "target_steps": str(chunk.target_steps),
            "num_output_tokens": str(chunk.num_output_tokens), "num_prompt_tokens": str(chunk.num_prompt_tokens)}
