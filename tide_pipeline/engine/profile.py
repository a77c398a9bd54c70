"""Measure what drafting and verifying cost, at start-up, on an idle engine. Knows networks; no requests."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from tide_pipeline.engine.control import SpeculationController
from tide_pipeline.models.eagle3 import DraftRunner
from tide_pipeline.models.layers import KVCache
from tide_pipeline.models.target import Target

CONTEXT = 128                      # cached positions during the profile
ROUNDS = 4
TRUE_ROWS = 2                      # rows that a draft's cache gains in a typical step


def profile_step_costs(target: Target, runner: DraftRunner, control: SpeculationController, max_batch: int, positions: int) -> None:
    """Time drafting and verification for batches 1, 2, 4, .. max_batch, every depth, and up to 1 + depth rows a request.

    The cells alternate, and the fastest of the rounds counts: what a busy machine adds is not the engine's.
    """
    batches = sorted({b for b in (1, 2, 4, 8, 16, 32, max_batch) if b <= max_batch})
    context, depths = min(CONTEXT, positions - 2), range(control.max_depth + 1)
    room = context + control.max_depth + TRUE_ROWS + 1
    cache, draft_cache = target.new_cache(max_batch, room), runner.new_cache(max_batch, room)
    draft: dict[tuple[int, int], float] = {}
    verify: dict[tuple[int, int], float] = {}
    for batch in batches:
        for _ in range(ROUNDS):
            for depth in depths:
                if depth:
                    _best(draft, (batch, depth), lambda b=batch, d=depth: _draft(runner, draft_cache, b, d, context))  # type: ignore[misc]
                _best(verify, (batch, batch * (1 + depth)), lambda b=batch, d=depth: _verify(target, cache, b, 1 + d, context))  # type: ignore[misc]
    control.costs.profile(draft, verify)


def _best(table: dict[tuple[int, int], float], cell: tuple[int, int], run: Callable[[], None]) -> None:
    began = time.perf_counter()
    run()
    table[cell] = min((time.perf_counter() - began) * 1e3, table.get(cell, float("inf")))


def _draft(runner: DraftRunner, cache: KVCache, batch: int, depth: int, context: int) -> None:
    at = torch.full((batch,), context)
    taps = runner.empty_taps(batch, TRUE_ROWS)
    positions = (at - TRUE_ROWS).unsqueeze(1) + torch.arange(TRUE_ROWS)
    state = runner.extend(taps, torch.zeros(batch, TRUE_ROWS, dtype=torch.long), positions, cache)[:, -1]
    for j in range(depth):
        ids = torch.tensor(runner.to_target(runner.logits(state).argmax(-1)).tolist())
        if j + 1 < depth:
            state = runner.step(state, ids, at + j, cache)


def _verify(target: Target, cache: KVCache, batch: int, width: int, context: int) -> None:
    positions = torch.arange(context, context + width).repeat(batch)
    _, final = target.forward_rows(torch.zeros(batch * width, dtype=torch.long), positions, [width] * batch, cache)
    target.logits(final).argmax(-1).tolist()
