"""Is the controller's choice never slower than the best fixed draft length, whatever draft and batch it meets?

    python benchmarks/adaptive.py --json benchmarks/results/adaptive.json
    python benchmarks/adaptive.py --cell 8,stale

Cells: batch 1, 4, 8, 16 x a fresh draft (the shipped one, on a domain it knows), a stale one (on a domain it never saw) and a useless
one (random weights). In each, one half of the blocks finds the best of {off, 1..5}; the other half times that one, off and the
controller ("auto") against each other, on prompts of their own, so that a fixed length that was only lucky gains nothing.

Every length has an engine of its own with a population of exactly `batch` running requests, and a block steps it until it has written
a number of tokens: the same for all, so that all read the same text at about the same time. The target's weights are shared. The first
step of a block is not timed, because the processor's caches hold another engine's keys and values; nor is joining. The controller sees
no step but its own.

Two engines differ by a percent or two for no reason but where their caches lie in memory ("off again/off"). So where nothing pays, the
last percent is measured inside one engine: the controller's own, whose requests ask for "auto" and for "off" in turn, a population a
block ("auto/off in one engine").
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from abba import Block, Work, alternate, median_rate, ratio, speed_ratios
from bench_engine import Drafts, Population, ask, drafts_of, engine_of, pick, prompts_of
from options import finish, parser, settle

from tide_pipeline.contracts import EngineBuild
from tide_pipeline.engine.embedded import EmbeddedEngine
from tide_pipeline.engine_spec import load_engine_spec
from tide_pipeline.models.target import Target

BATCHES = (1, 4, 8, 16)
DRAFTS = ("fresh", "stale", "useless")
FIXED = ("off", "1", "2", "3", "4", "5")
AUTO = "auto"
TWIN = "off again"                 # another engine without drafts: its ratio to off is what the measurement can tell apart
PROMPT_CHARS = 80                  # short prompts: joining is not timed, but takes time
ROOM_TOKENS = 420                  # a request may write: far more than it does before its population leaves
POPULATION_TOKENS = 60             # per request, on average: one that loops may write six times as much
TRIAL_TOKENS = 8                   # per request
FEWEST_TOKENS, MOST_TOKENS = 12, 60
JOINING_SHARE = 0.25               # of the time, roughly


@dataclass(frozen=True)
class Plan:
    """How much is measured in each cell."""

    choose_rounds: int             # of six blocks
    score_rounds: int              # of four
    pairs: int                     # in one engine, where nothing should pay; beyond the cell's time
    cell_s: float

    @property
    def block_s(self) -> float:
        return (1 - JOINING_SHARE) * self.cell_s / (self.choose_rounds * len(FIXED) + self.score_rounds * 4)


class Cell:
    """One batch size and one kind of draft."""

    def __init__(self, batch: int, draft: str, engines: Mapping[str, EmbeddedEngine], temperature: float) -> None:
        self.batch, self.draft, self.engines, self.temperature = batch, draft, engines, temperature
        self.tokens = TRIAL_TOKENS                 # per request and block
        self._running: dict[str, Population] = {}
        self._goal = 0                             # of the block that comes next

    def run(self, lengths: Sequence[str], rounds: int, prompts: Sequence[str]) -> dict[str, list[Block]]:
        def work(length: str) -> Work:
            return lambda _round: self._running[length].advance_to(self._goal)

        blocks = alternate({length: work(length) for length in lengths}, rounds,
                           before=lambda length, round_: self._prepare(length, round_, prompts))
        for length in lengths:
            self._leave(length)
        return blocks

    def fit(self, block_s: float, prompts: Sequence[str]) -> None:
        """Choose how much a block writes, so that it takes `block_s`, on average over the lengths."""
        trial = self.run(FIXED, 1, prompts)
        each_s = sum(some[0].wall_s / some[0].units for some in trial.values()) / len(trial)
        self.tokens = max(FEWEST_TOKENS, min(MOST_TOKENS, int(block_s / each_s / self.batch)))

    def _prepare(self, length: str, round_: int, prompts: Sequence[str]) -> None:
        """A population joins, or goes on; and takes one step. Where lengths share an engine, one at a time is in it."""
        a_block = self.batch * (self.tokens + 1)   # the step that is not timed included
        shared = self.engines[AUTO] is self.engines["off"]
        stays = 1 if shared else max(1, POPULATION_TOKENS // (self.tokens + 1))
        if round_ % stays == 0:
            for leaving in list(self._running) if shared else [length]:
                self._leave(leaving)
            asked = [ask(prompt, ROOM_TOKENS, "off" if length == TWIN else length, self.draft, self.temperature)
                     for prompt in pick(prompts, self.batch, round_ // stays)]
            self._running[length] = Population(self.engines[length], asked)
        self.engines[length].step()
        self._goal = a_block * (round_ % stays + 1)

    def _leave(self, length: str) -> None:
        if length in self._running:
            self._running.pop(length).leave()


def best_of(blocks: dict[str, list[Block]]) -> tuple[str, dict[str, float]]:
    """The fixed length with the highest median speed relative to off in the same round, and all those medians."""
    gains = {length: round(float(np.median(speed_ratios(some, blocks["off"], "wall_s"))), 4) for length, some in blocks.items()}
    return max(gains, key=lambda length: gains[length]), gains


def measure(cell: Cell, plan: Plan, prompts: Sequence[str]) -> dict[str, Any]:
    to_choose, to_score = prompts[::2], prompts[1::2]
    cell.fit(plan.block_s, to_choose)
    best, gains = best_of(cell.run(FIXED, plan.choose_rounds, to_choose))
    cell.run([AUTO], min(3, plan.choose_rounds), to_choose)       # it has met this batch and this draft before it is timed
    controlled = cell.engines[AUTO]
    known = controlled.stats().draft_length_steps
    scored = cell.run(list(dict.fromkeys([AUTO, best, "off", TWIN])), plan.score_rounds, to_score)
    alone = {}
    if cell.draft != "fresh":
        one = Cell(cell.batch, cell.draft, {AUTO: controlled, "off": controlled}, cell.temperature)
        one.tokens = cell.tokens
        pairs = one.run([AUTO, "off"], plan.pairs, to_score)
        alone = {"auto/off in one engine": ratio(pairs[AUTO], pairs["off"])}
    chose = {length: n - known.get(length, 0) for length, n in controlled.stats().draft_length_steps.items()}
    return {"batch": cell.batch, "draft": cell.draft, "tokens_per_block": cell.tokens * cell.batch, "best_fixed": best,
            "speedup_when_chosen": gains, "tokens_per_s": {length: median_rate(blocks) for length, blocks in scored.items()},
            "auto/best_fixed": ratio(scored[AUTO], scored[best]), "auto/off": ratio(scored[AUTO], scored["off"]),
            "off again/off": ratio(scored[TWIN], scored["off"]), **alone,
            "auto_draft_length_steps": dict(sorted(chose.items()))}


def parse_cell(text: str) -> tuple[int, str]:
    batch, _, draft = text.partition(",")
    if not batch.isdigit() or int(batch) < 1 or draft not in DRAFTS:
        raise argparse.ArgumentTypeError(f"{text!r} is no cell: write BATCH,DRAFT with a draft of {', '.join(DRAFTS)}, such as 8,stale")
    return int(batch), draft


def builds_of(drafts: Drafts) -> dict[str, EngineBuild]:
    """Workload tag -> build: the tag keeps what the controller learns of one kind of draft apart from the others."""
    return {"fresh": drafts.champion, "stale": drafts.champion, "useless": drafts.useless}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--cell", type=parse_cell, action="append", help="BATCH,DRAFT: this cell only; may be given again")
    options.add_argument("--known", default="en", help="domain of the fresh and the useless draft's prompts")
    options.add_argument("--unseen", default="de", help="domain of the stale draft's prompts")
    options.add_argument("--cell-seconds", type=float, default=20.0, help="of a cell; blocks are sized to fit")
    options.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    options.add_argument("--choose-rounds", type=int, default=15)
    options.add_argument("--score-rounds", type=int, default=30)
    options.add_argument("--pairs", type=int, default=100)
    args = options.parse_args()
    result = settle()
    plan = Plan(1, 2, 2, 0.6) if args.quick else Plan(args.choose_rounds, args.score_rounds, args.pairs, args.cell_seconds)
    cells = args.cell or ([(2, "useless")] if args.quick else [(batch, draft) for batch in BATCHES for draft in DRAFTS])
    largest = max(batch for batch, _ in cells)
    with drafts_of(args.engine_dir) as drafts, ExitStack() as stack:
        spec = load_engine_spec(args.engine_dir)
        target = Target(args.engine_dir / spec.model, spec)
        engines = {length: stack.enter_context(engine_of(args.engine_dir, builds_of(drafts), largest, profile=length == AUTO,
                                                         target=target)) for length in (AUTO, *FIXED, TWIN)}
        result |= {"engine": engines[AUTO].digest, "known": args.known, "unseen": args.unseen, "temperature": args.temperature,
                   "step_ms_at_start": engines[AUTO].stats().step_ms, "cells": []}
        for batch, draft in cells:
            prompts = prompts_of(args.engine_dir, args.unseen if draft == "stale" else args.known, PROMPT_CHARS)
            result["cells"].append(measure(Cell(batch, draft, engines, args.temperature), plan, prompts))
            print(f"batch {batch}, {draft} draft: done", file=sys.stderr, flush=True)
        result["step_ms_at_end"] = engines[AUTO].stats().step_ms
    finish(result, args)


if __name__ == "__main__":
    main()
