"""Decode one forward pass of TensorRT-LLM's one-model EAGLE-3: whose row is which, and what became of whose draft. Pure; no tensor.

    rows         [context tokens of request 0 | 1 | ..][generation 0: 1 + K rows][generation 1: 1 + K rows] .. [padding]
    new_tokens   [i, j]: one row for each request in that order, of which new_tokens_lens[i] count

    generation i     row 0    row 1    row 2             consumed: the pending token, then the draft that is verified
                     x_t      d_1      d_2       K = 2
    new_tokens[i]    x_t+1    x_t+2    x_t+3             x_t+1 = d_1 where it was accepted
                     with lens[i] = 2 rows 0 and 1 are true, d_2 was refused, x_t+2 is pending for the next step

Positions are never read from the server: with its overlap scheduler the host learns them a step late. They follow from the context, which
says where it begins (a prefix that came from the cache is not computed, so it has no rows), and from what every step emitted.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tide_pipeline.contracts import StepKind

UNKNOWN = -1                       # a draft token that nobody saw: it counts, and is never stored


class LayoutBroken(Exception):
    """What came back contradicts the layout above: nothing decoded from now on could be trusted."""


@dataclass(frozen=True, slots=True)
class Context:
    """A chunk of one request's prompt; after a preemption, of its prompt and output so far."""

    request: int                   # the server's number of the request
    start_pos: int
    tokens: tuple[int, ...]
    is_last: bool                  # the first output token follows


@dataclass(frozen=True, slots=True)
class Forward:
    """What is known of a pass before it runs. Numbers of requests that nobody opened are dummies: they have rows and are not decoded."""

    contexts: tuple[Context, ...]
    generations: tuple[int, ...]   # request numbers, in the order of the rows
    draft_length: int              # K of this pass

    @property
    def num_rows(self) -> int:
        return sum(len(c.tokens) for c in self.contexts) + len(self.generations) * (1 + self.draft_length)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the device said: one entry for each request, contexts first. Entries beyond are padding."""

    new_tokens: Sequence[Sequence[int]]
    new_tokens_lens: Sequence[int]
    next_drafts: Sequence[Sequence[int]]       # what the next pass verifies


@dataclass(frozen=True, slots=True)
class End:
    """Where a request's output ends: the server notices a pass late, and what it computed beyond is nobody's."""

    num_tokens: int                # prompt and output, at most
    eos_ids: Collection[int] = ()

    def cut(self, tokens: Sequence[int], known: int) -> tuple[int, ...]:
        """What counts of `tokens`, which follow `known` ones."""
        kept = tuple(tokens[: max(0, self.num_tokens - known)])
        return next((kept[: i + 1] for i, token in enumerate(kept) if token in self.eos_ids), kept)


@dataclass(frozen=True, slots=True)
class Progress:
    """One request between two passes."""

    end: End
    next_pos: int = 0              # of the row that comes next
    pending: int | None = None     # the token that it consumes; None while the prompt goes on
    drafts: tuple[int, ...] = ()   # what stands after it
    is_over: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """One request's part of a pass, as contracts.StepEvent says it; `rows` are rows of the pass."""

    request: int
    kind: StepKind
    start_pos: int
    row_tokens: tuple[int, ...]
    emitted: tuple[int, ...]
    drafted: tuple[int, ...]
    accepted: int
    draft_length: int
    rows: range


class Decoder:
    """Progress of the requests that were opened."""

    def __init__(self) -> None:
        self._progress: dict[int, Progress] = {}

    def open(self, request: int, end: End) -> None:
        self._progress[request] = Progress(end)

    def close(self, request: int) -> None:
        self._progress.pop(request, None)

    def decode(self, forward: Forward, outcome: Outcome) -> list[Step]:
        """The steps of opened requests. Raises LayoutBroken, and then knows nothing any more."""
        try:
            return self._decode(forward, outcome)
        except LayoutBroken:
            self._progress.clear()
            raise

    def _decode(self, forward: Forward, outcome: Outcome) -> list[Step]:
        check_shape(forward, outcome)
        steps: list[Step] = []
        for i, (request, rows) in enumerate(row_ranges(forward)):
            before = self._progress.get(request)
            if before is None or before.is_over:
                continue
            said = outcome.new_tokens[i][: outcome.new_tokens_lens[i]], tuple(outcome.next_drafts[i])
            if i < len(forward.contexts):
                step, after = consume(forward.contexts[i], before, rows, *said)
            elif before.pending is None:                       # its prompt was never seen
                continue
            else:
                step, after = verify(request, before, rows, forward.draft_length, *said)
            self._progress[request] = after
            steps.append(step)
        return steps


def row_ranges(forward: Forward) -> list[tuple[int, range]]:
    """Request number and rows, in order."""
    found, at = [], 0
    for request, width in [*((c.request, len(c.tokens)) for c in forward.contexts),
                           *((request, 1 + forward.draft_length) for request in forward.generations)]:
        found.append((request, range(at, at + width)))
        at += width
    return found


def check_shape(forward: Forward, outcome: Outcome) -> None:
    """Raises LayoutBroken where the device's answer is not of this pass."""
    requests = len(forward.contexts) + len(forward.generations)
    if min(len(outcome.new_tokens), len(outcome.new_tokens_lens), len(outcome.next_drafts)) < requests:
        raise LayoutBroken(f"{requests} requests, and answers for {len(outcome.new_tokens_lens)}")
    for i, count in enumerate(outcome.new_tokens_lens[:requests]):
        most = 1 if i < len(forward.contexts) else 1 + forward.draft_length
        if not 1 <= count <= most or len(outcome.new_tokens[i]) < count:
            raise LayoutBroken(f"request {i} of the pass has {count} new tokens, with {most} rows to give them")


def consume(context: Context, before: Progress, rows: range, new_tokens: Sequence[int], drafts: tuple[int, ...]) -> tuple[Step, Progress]:
    """A chunk of a prompt. The token that follows it counts only after the last one."""
    stop_pos = context.start_pos + len(context.tokens)
    emitted = before.end.cut(new_tokens, stop_pos) if context.is_last else ()
    after = Progress(before.end, stop_pos, emitted[-1] if emitted else None, drafts if context.is_last else ())
    after = _ended(after) if context.is_last else after
    return Step(context.request, StepKind.PREFILL, context.start_pos, context.tokens, emitted, (), 0, 0, rows), after


def verify(request: int, before: Progress, rows: range, draft_length: int, new_tokens: Sequence[int],
           drafts: tuple[int, ...]) -> tuple[Step, Progress]:
    """The pending token and K draft tokens. As many rows are true as tokens are new: each was consumed to give the next."""
    assert before.pending is not None, "asked before"
    accepted = len(new_tokens) - 1
    known = before.drafts[:draft_length]
    if known[:accepted] != tuple(new_tokens[: min(accepted, len(known))]):
        raise LayoutBroken("accepted draft tokens are not those that were drafted")
    drafted = (*new_tokens[:accepted], *known[accepted:], *[UNKNOWN] * draft_length)[:draft_length]
    emitted = before.end.cut(new_tokens, before.next_pos + 1)
    if len(emitted) <= accepted:                               # it ended within its draft: what stood beyond was never judged
        drafted = drafted[: len(emitted)]
    kind = StepKind.VERIFY if drafted else StepKind.DECODE
    step = Step(request, kind, before.next_pos, (before.pending, *emitted[:-1]), emitted, drafted,
                min(accepted, len(emitted)), draft_length, rows[: len(emitted)])
    return step, _ended(Progress(before.end, before.next_pos + len(emitted), emitted[-1] if emitted else None, drafts))


def _ended(progress: Progress) -> Progress:
    is_over = progress.pending is None or progress.pending in progress.end.eos_ids or progress.next_pos + 1 >= progress.end.num_tokens
    return Progress(progress.end, progress.next_pos, progress.pending, progress.drafts, is_over)
