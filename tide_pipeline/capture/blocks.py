"""Steps of one request, added up into AcceptanceRows. Pure counting; knows no clock, tensors or files.

Prefill steps are not counted: the token they emit is no step's gain. Blocks of different (draft version, draft length, probe) stay
open side by side, so that a controller that changes its mind every step still gives few rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tide_pipeline.contracts import AcceptanceRow, RequestClosed, RequestOpened, StepEvent, StepKind

BlockKey = tuple[str, int, bool]           # draft version, draft length, is it a probe


@dataclass(slots=True)
class _Block:
    """`outcomes` counts steps by (drafted tokens, accepted of them); positions are worked out once, for the row."""

    num_steps: int = 0
    outcomes: dict[tuple[int, int], int] = field(default_factory=dict)
    emitted_tokens: int = 0
    batch_sizes: int = 0
    duration_ms: float = 0.0

    def add(self, event: StepEvent) -> None:
        outcome = (len(event.drafted), event.accepted)
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        self.num_steps += 1
        self.emitted_tokens += len(event.emitted)
        self.batch_sizes += event.batch_size
        self.duration_ms += event.step_ms

    def by_position(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Per position: steps that drafted a token there, and steps that accepted it."""
        deepest = max((drafted for drafted, _ in self.outcomes), default=0)
        return (tuple(sum(n for (drafted, _), n in self.outcomes.items() if drafted > position) for position in range(deepest)),
                tuple(sum(n for (_, accepted), n in self.outcomes.items() if accepted > position) for position in range(deepest)))


class AcceptanceBlocks:
    """One request's open blocks; `emit` takes each closed one as a row."""

    def __init__(self, opened: RequestOpened, replica: str, engine_digest: str, block_steps: int,
                 emit: Callable[[AcceptanceRow], object], clock: Callable[[], float]) -> None:
        self._opened, self._replica, self._engine_digest = opened, replica, engine_digest
        self._block_steps, self._emit, self._clock = block_steps, emit, clock
        self._open: dict[BlockKey, _Block] = {}
        self._draft_version = ""
        self.drafted_steps = 0                     # steps that drafted a first token, of the whole request
        self.accepted_first = 0                    # of them, steps that accepted it

    def add(self, event: StepEvent) -> None:
        self._draft_version = event.draft_version or self._draft_version
        if event.kind is StepKind.PREFILL:
            return
        self.drafted_steps += bool(event.drafted)
        self.accepted_first += event.accepted > 0
        key = (event.draft_version, event.draft_length, event.kind is StepKind.PROBE)
        if (block := self._open.get(key)) is None:
            block = self._open[key] = _Block()
        block.add(event)
        if block.num_steps >= self._block_steps:
            del self._open[key]
            self._emit(self._row(key, block, "", 0.0))

    def close(self, closed: RequestClosed) -> None:
        """Close every block. The last row tells how the request ended; a request without a step gets one row of zeros."""
        blocks = list(self._open.items()) or [((self._draft_version, 0, False), _Block())]
        self._open = {}
        for number, (key, block) in enumerate(blocks, start=1):
            is_last = number == len(blocks)
            self._emit(self._row(key, block, str(closed.finish_reason) if is_last else "", closed.ttft_ms if is_last else 0.0))

    def _row(self, key: BlockKey, block: _Block, finish_reason: str, ttft_ms: float) -> AcceptanceRow:
        opened, (draft_version, draft_length, is_probe) = self._opened, key
        drafted, accepted = block.by_position()
        return AcceptanceRow(
            time=self._clock(), request_id=opened.request_id, workload=opened.workload, tenant=opened.tenant, replica=self._replica,
            engine_digest=self._engine_digest, draft_version=draft_version, speculation=opened.speculation,
            temperature=opened.sampling.temperature, draft_length=draft_length, is_probe=is_probe, num_steps=block.num_steps,
            drafted=drafted, accepted=accepted, emitted_tokens=block.emitted_tokens,
            mean_batch_size=block.batch_sizes / max(1, block.num_steps), duration_ms=block.duration_ms,
            num_prompt_tokens=opened.num_prompt_tokens, finish_reason=finish_reason, ttft_ms=ttft_ms)
