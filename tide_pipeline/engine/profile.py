"""Measure what drafting and verifying cost, at start-up, on an idle engine. Knows networks; no requests."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping

import torch

from tide_pipeline.engine.control import SpeculationController
from tide_pipeline.engine.costs import Cell
from tide_pipeline.engine.drafts import ResidentDraft, confidences
from tide_pipeline.models.eagle3 import DraftRunner
from tide_pipeline.models.layers import KVCache
from tide_pipeline.models.target import Target

CONTEXTS = (64, 512, 2_048, 8_192, 32_768)       # cached positions; a cost is straight between two of them
ROUNDS = 4
TRUE_ROWS = 2                                    # rows that a draft's cache gains in a typical step


def profile_step_costs(target: Target, cache: KVCache, resident: ResidentDraft, control: SpeculationController, max_batch: int,
                       positions: int) -> None:
    """Time drafting and verification for batches 1, 2, 4, .. max_batch, every depth, and up to 1 + depth rows a request.

    All cells are timed in turn, and the fastest of the rounds counts: what a busy machine adds is not the engine's. Each ends by reading
    tokens, so a GPU's work is in its time. The engine's own caches are used, which no request may hold: what serves is what is timed.
    """
    runner, draft_cache = resident.runner, resident.cache
    batches = sorted({b for b in (1, 2, 4, 8, 16, 32, max_batch) if b <= max_batch})
    longest = max(1, positions - control.max_depth - TRUE_ROWS - 1)
    draft: dict[Cell, float] = {}
    verify: dict[Cell, float] = {}
    for _ in range(ROUNDS):
        for c, b, d in itertools.product(sorted({min(c, longest) for c in CONTEXTS}), batches, range(control.max_depth + 1)):
            if d:
                _keep_best(draft, (b, d, c), lambda b=b, d=d, c=c: _draft(runner, draft_cache, b, d, c))  # type: ignore[misc]
            _keep_best(verify, (b, b * (1 + d), c), lambda b=b, d=d, c=c: _verify(target, cache, b, 1 + d, c))  # type: ignore[misc]
    control.costs.profile(monotone(draft), monotone(verify))


def monotone(cells: Mapping[Cell, float]) -> dict[Cell, float]:
    """A pass is at most as long as any that does more, of which one may have been measured in a quieter moment."""
    return {cell: min(ms for other, ms in cells.items() if all(a >= b for a, b in zip(other, cell, strict=True))) for cell in cells}


def _keep_best(table: dict[Cell, float], cell: Cell, run: Callable[[], None]) -> None:
    began = time.perf_counter()
    run()
    table[cell] = min((time.perf_counter() - began) * 1e3, table.get(cell, float("inf")))


def _draft(runner: DraftRunner, cache: KVCache, batch: int, depth: int, context: int) -> None:
    at = torch.full((batch,), context)
    rows = batch * TRUE_ROWS
    positions = (at - TRUE_ROWS).unsqueeze(1) + torch.arange(TRUE_ROWS)
    states = runner.extend(runner.empty_taps(rows), torch.zeros(rows, dtype=torch.long), positions.flatten(), [TRUE_ROWS] * batch, cache)
    state = states[TRUE_ROWS - 1 :: TRUE_ROWS]
    for j in range(depth):
        logits = runner.logits(state)
        confidences(logits)
        ids = torch.tensor(runner.to_target(logits.argmax(-1)).tolist())
        if j + 1 < depth:
            state = runner.step(state, ids, at + j, cache)


def _verify(target: Target, cache: KVCache, batch: int, width: int, context: int) -> None:
    positions = torch.arange(context, context + width).repeat(batch)
    _, final = target.forward_rows(torch.zeros(batch * width, dtype=torch.long), positions, [width] * batch, cache)
    target.logits(final).argmax(-1).tolist()
