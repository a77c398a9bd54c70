"""Rows of one request, assembled into gapless windows. Knows positions and tokens; knows neither queues nor files.

# tokens   x0 x1 x2 x3      token_ids: T + 1 entries
# rows     r0 r1 r2         T rows; row t was made when the target consumed x_t
A row that was not captured ends the window before it. A window whose following token never became known gives up its last row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tide_pipeline.capture.rows import OpenRows, Words
from tide_pipeline.capture.schema import token_bytes
from tide_pipeline.contracts import RequestOpened, SamplingParams, StepEvent, StepKind

MAX_ROWS = 1024                    # of one window; a longer request becomes several
MAX_WINDOW_BYTES = 32 * 2**20      # of states in one window: one at least must fit an object of a bucket


@dataclass(frozen=True, slots=True, eq=False)
class ClosedWindow:
    """A finished window on its way to the writer; the only record here that holds states."""

    request_id: str
    tenant: str
    workload: str
    draft_version: str             # of the last step that named one
    engine_digest: str
    speculation: str
    sampling: SamplingParams
    num_prompt_tokens: int
    prompt_digest: str
    start_pos: int
    token_ids: list[int]           # T + 1
    rejected: list[tuple[int, int]]
    words: Sequence[Words]         # its rows [taps | final], in order
    hidden_size: int
    num_taps: int
    with_final: bool
    closed_at: float

    @property
    def num_rows(self) -> int:
        return len(self.token_ids) - 1

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in self.words)


@dataclass(frozen=True, slots=True)
class RowShape:
    """What a row of the engine's ring holds, and which engine made it."""

    hidden_size: int
    num_taps: int
    with_final: bool
    engine_digest: str

    @property
    def width(self) -> int:
        return self.hidden_size * (self.num_taps + int(self.with_final))

    @property
    def max_rows(self) -> int:
        """Of a window: MAX_ROWS, or fewer where rows are wide."""
        return max(1, min(MAX_ROWS, MAX_WINDOW_BYTES // max(1, 2 * self.width)))


class WindowAssembler:
    """Collects one request's rows; calls `emit` with each closed window."""

    def __init__(self, opened: RequestOpened, shape: RowShape, emit: Callable[[ClosedWindow], object],
                 clock: Callable[[], float], max_rows: int = MAX_ROWS) -> None:
        self._opened, self._shape, self._emit, self._clock, self._max_rows = opened, shape, emit, clock, max_rows
        self._prompt_digest = prompt_digest(opened.prompt_ids)
        self._draft_version = ""
        self._rows = OpenRows()
        self._start, self._end = 0, 0              # positions of the open window: [start, end)
        self._tokens: list[int] = []
        self._follower: int | None = None          # the token at position `end`, once known
        self._rejected: list[tuple[int, int]] = []

    def add(self, event: StepEvent, words_NW: Words | None) -> None:
        """Copy a step's rows; None means that its states were lost."""
        self._draft_version = event.draft_version or self._draft_version
        n = len(event.row_tokens)
        known = max(0, min(n, self._end - event.start_pos))      # rows seen before (a recomputed prefix) are not stored twice
        if known == n:
            return
        start, tokens = event.start_pos + known, event.row_tokens[known:]
        if start == self._end and self._follower is None:
            self._follower = tokens[0]
        if words_NW is None or start != self._end or self._follower != tokens[0]:
            self.close()
        if words_NW is None:
            return
        if len(words_NW) != n:
            raise ValueError(f"step with {n} tokens has {len(words_NW)} rows")
        self._append(start, tokens, words_NW[known:])
        self._follower = _follower(event)
        if event.accepted < len(event.drafted) and event.drafted[event.accepted] >= 0:
            self._rejected.append((event.start_pos + event.accepted + 1, event.drafted[event.accepted]))

    def close(self) -> None:
        """End the open window, if there is one; the next row begins another."""
        tokens = self._tokens if self._follower is None else [*self._tokens, self._follower]
        num_rows = len(tokens) - 1
        if num_rows > 0:
            last = self._start + num_rows
            self._emit(ClosedWindow(
                request_id=self._opened.request_id, tenant=self._opened.tenant, workload=self._opened.workload,
                draft_version=self._draft_version, engine_digest=self._shape.engine_digest, speculation=self._opened.speculation,
                sampling=self._opened.sampling, num_prompt_tokens=self._opened.num_prompt_tokens,
                prompt_digest=self._prompt_digest, start_pos=self._start, token_ids=tokens,
                rejected=[r for r in self._rejected if r[0] <= last], words=self._rows.first(num_rows),
                hidden_size=self._shape.hidden_size, num_taps=self._shape.num_taps, with_final=self._shape.with_final,
                closed_at=self._clock()))
        self._rows, self._tokens, self._rejected, self._follower = OpenRows(), [], [], None

    def _append(self, start: int, tokens: tuple[int, ...], words_NW: Words) -> None:
        done = 0
        while done < len(tokens):
            if len(self._tokens) == self._max_rows:
                self._follower = tokens[done]
                self.close()
            if not self._tokens:
                self._start = start + done
            take = min(len(tokens) - done, self._max_rows - len(self._tokens))
            self._rows.add(words_NW[done:done + take])
            self._tokens.extend(tokens[done:done + take])
            done += take
        self._end = start + len(tokens)


def prompt_digest(prompt_ids: Sequence[int]) -> str:
    """32 hex digits: the first half of the SHA-256 over the prompt's int32 tokens. The same prompt has the same one, everywhere."""
    return hashlib.sha256(token_bytes(prompt_ids)).hexdigest()[:32]


def _follower(event: StepEvent) -> int | None:
    """The token after the step's last row, if the step emitted it."""
    index = 0 if event.kind is StepKind.PREFILL else len(event.row_tokens) - 1
    return event.emitted[index] if index < len(event.emitted) else None
