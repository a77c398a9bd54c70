"""The state of one request inside the embedded engine. Plain bookkeeping; computes nothing."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tide_pipeline.contracts import FinishReason, GenerationRequest, TokenChunk
from tide_pipeline.engine.drafts import ResidentDraft
from tide_pipeline.engine.protocol import TokenStream
from tide_pipeline.engine.survival import RequestSurvival
from tide_pipeline.engine.text import TextStream


@dataclass(eq=False)
class ActiveRequest:
    """`tokens` holds prompt and output; the target's cache covers the first `consumed` of them (all but the last)."""

    request: GenerationRequest
    stream: TokenStream
    text: TextStream
    tokens: list[int]
    num_prompt: int
    fixed_length: int | None               # None: the controller decides; 0: never speculate
    submitted_at: float = field(default_factory=time.monotonic)
    first_token_at: float = 0.0
    last_step_at: float = 0.0
    slot: int = -1                         # in the target's cache
    consumed: int = 0
    cancelled: bool = False
    draft: ResidentDraft | None = None
    version: str = ""                      # of the draft that it was given
    survival: RequestSurvival | None = None
    draft_slot: int = -1                   # in the draft's cache
    draft_rows: int = 0                    # rows the draft's cache covers
    draft_state: Tensor | None = None      # [D] output of the draft's last true row
    waiting_taps: list[Tensor] = field(default_factory=list)   # [n, G * D] each: rows the draft has not seen yet
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    verify_steps: int = 0
    target_steps: int = 0

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def remaining(self) -> int:
        return self.request.sampling.max_tokens - self.num_output

    @property
    def waiting_rows(self) -> int:
        return self.consumed - self.draft_rows

    @property
    def greedy(self) -> bool:
        return self.request.sampling.temperature == 0.0

    def observe(self, emitted: int, drafted: int, accepted: int, confidences: Sequence[float]) -> None:
        """A step consumed its last token and the accepted drafts."""
        self.consumed += emitted
        self.target_steps += 1
        self.verify_steps += drafted > 0
        self.drafted_tokens += drafted
        self.accepted_tokens += accepted
        if self.survival is not None:
            self.survival.observe(drafted, accepted, confidences)

    def take(self, emitted: list[int], eos_ids: Collection[int]) -> tuple[list[int], str]:
        """The tokens of a step that the request takes, and their text. It ends at max_tokens, at end-of-text and at a stop
        string, on the same token as plain decoding does."""
        emitted, how = emitted[: self.remaining], self.request.sampling
        if not how.ignore_eos:
            end = next((i for i, token in enumerate(emitted) if token in eos_ids), len(emitted))
            emitted = emitted[: end + 1]
        if not how.stop:
            return emitted, self.text.push(emitted)
        text = ""
        for i, token in enumerate(emitted):
            text += self.text.push([token])
            if self.text.stopped:
                return emitted[: i + 1], text
        return emitted, text

    def reason_to_end(self, eos_ids: Collection[int], positions: int) -> FinishReason | None:
        """After what it took last."""
        if self.text.stopped or (self.tokens[-1] in eos_ids and not self.request.sampling.ignore_eos):
            return FinishReason.STOP
        return FinishReason.LENGTH if self.remaining <= 0 or len(self.tokens) >= positions else None

    def chunk(self, tokens: tuple[int, ...], reason: FinishReason | None, text: str = "", error: str = "") -> TokenChunk:
        """What its client is told, with the totals so far."""
        return TokenChunk(self.request.request_id, tokens, text, reason, error, self.num_prompt, self.num_output, self.drafted_tokens,
                          self.accepted_tokens, self.verify_steps, self.target_steps, self.version)

    def take_waiting(self) -> list[Tensor]:
        """Rows [n, G * D] each; the buffer is empty afterwards."""
        rows, self.waiting_taps = self.waiting_taps, []
        return rows

    def give_up_drafting(self) -> None:
        """To its end it is decoded plainly."""
        if self.draft is not None:
            self.draft.leave(self)
        self.draft = self.survival = self.draft_state = None
        self.waiting_taps.clear()
