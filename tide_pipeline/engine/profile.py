"""Measure T_step(batch, depth) at start-up, on an idle engine. Knows networks; no requests."""

from __future__ import annotations

import time

import torch

from tide_pipeline.engine.control import StepTimes
from tide_pipeline.models.eagle3 import DraftRunner
from tide_pipeline.models.layers import KVCache
from tide_pipeline.models.target import Target

CONTEXT = 128                      # cached positions during the profile
ROUNDS = 3


def profile_step_times(target: Target, runner: DraftRunner, times: StepTimes, max_batch: int, positions: int) -> None:
    """Time whole rounds (catch-up, drafting, verification, argmax) for batches 1, 2, 4, .. max_batch and every depth.

    Rounds of different depths alternate, and the fastest counts: what a busy machine adds is not the engine's.
    """
    batches = sorted({b for b in (1, 2, 4, 8, 16, 32, max_batch) if b <= max_batch})
    context = min(CONTEXT, positions - 2)
    cache = target.new_cache(max_batch, context + times.max_depth + 2)
    draft_cache = runner.new_cache(max_batch, context + times.max_depth + 2)
    for batch in batches:
        best: dict[int, float] = {}
        for _ in range(ROUNDS):
            for depth in range(times.max_depth + 1):
                began = time.perf_counter()
                _round(target, runner, cache, draft_cache, batch, depth, context)
                ms = (time.perf_counter() - began) * 1e3
                best[depth] = min(ms, best.get(depth, ms))
        for depth, ms in best.items():
            times.record(batch, depth, ms)


def _round(target: Target, runner: DraftRunner, cache: KVCache, draft_cache: KVCache, batch: int, depth: int, context: int) -> None:
    at = torch.full((batch,), context)
    if depth:
        taps = torch.zeros(batch, 2, runner.shape.num_taps * runner.shape.hidden_size)
        state = runner.extend(taps, torch.zeros(batch, 2, dtype=torch.long), (at - 2).unsqueeze(1) + torch.arange(2), draft_cache)[:, -1]
        for j in range(depth):
            ids = runner.logits(state).argmax(-1)
            if j + 1 < depth:
                state = runner.step(state, ids, at + j, draft_cache)
    positions = at.unsqueeze(1) + torch.arange(1 + depth)
    _, final = target.forward(torch.zeros(batch, 1 + depth, dtype=torch.long), positions, cache)
    target.logits(final.flatten(0, 1)).argmax(-1).tolist()
