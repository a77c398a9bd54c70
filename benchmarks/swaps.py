"""Do draft swaps disturb the requests that run through them? Two builds of the shipped draft take turns under load.

    python benchmarks/swaps.py --json benchmarks/results/swaps.json

A block is a set of greedy requests, more than there are slots, through an engine that runs in its own thread as it does behind Triton;
the calling thread swaps after every few requests that end, or does not. Blocks with and without swaps alternate and ask for the same.
Told are: requests that failed; the 99th percentile of the time between a request's chunks, with swaps over without; memory; and whether
the tokens are the same (where they are not, whether each is the argmax of a plain pass within epsilon, see docs/engine.md).
"""

from __future__ import annotations

import argparse
import gc
import queue
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
from abba import Block, order, quantile_ratio, ratio
from bench_engine import Drafts, ask, drafts_of, engine_of, pick, prompts_of, settings
from options import finish, parser, settle

from tide_pipeline.contracts import ANY_WORKLOAD, EngineBuild, FinishReason, GenerationRequest, TokenChunk
from tide_pipeline.engine.embedded import EmbeddedEngine
from tide_pipeline.gate.equivalence import Equivalence, check_equivalence

SWAPS, STEADY = "swaps", "steady"
PROMPT_CHARS = 120
WARM_UP_ROUNDS = 3                 # memory is counted from here: caches and allocator arenas have grown


class Heard:
    """What the clients of one block heard. Called from the engine's thread. Kept small: memory is one of the things measured."""

    def __init__(self, requests: Sequence[GenerationRequest]) -> None:
        self.tokens = {request.request_id: array("i") for request in requests}
        self.gaps_ms = array("f")
        self.failed: list[str] = []
        self.versions: set[str] = set()
        self.ended: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.cpu: tuple[float, float] | None = None            # at the first and the newest chunk
        self.last_at = 0.0
        self._last: dict[str, float] = {}

    def __call__(self, chunk: TokenChunk) -> None:
        now = self.last_at = time.perf_counter()
        if chunk.request_id in self._last:
            self.gaps_ms.append((now - self._last[chunk.request_id]) * 1e3)
        self._last[chunk.request_id] = now
        self.tokens[chunk.request_id].extend(chunk.token_ids)
        cpu = time.thread_time()
        self.cpu = (self.cpu[0] if self.cpu else cpu), cpu
        self.versions.add(chunk.draft_version)
        if chunk.finish_reason is not None:
            if chunk.finish_reason is not FinishReason.LENGTH:
                self.failed.append(f"{chunk.finish_reason} {chunk.error}".strip())
            self.ended.put(chunk.request_id)


@dataclass(frozen=True)
class Run:
    """One block."""

    block: Block
    heard: Heard
    swap_s: tuple[float, ...]      # each swap: load, check, take over


class Load:
    """The engine, what is asked of it, and the two builds that take turns."""

    def __init__(self, engine: EmbeddedEngine, builds: tuple[EngineBuild, EngineBuild], prompts: Sequence[str], requests: int,
                 every: int) -> None:
        self.engine, self.prompts, self.requests, self.every = engine, prompts, requests, every
        self._builds = self._turns(builds)

    @staticmethod
    def _turns(builds: tuple[EngineBuild, EngineBuild]) -> Iterator[EngineBuild]:
        while True:
            yield from builds

    def run(self, name: str, round_: int) -> Run:
        texts = pick(self.prompts, self.requests, round_)
        requests = [ask(text, 24 + 8 * (i % 5), "auto") for i, text in enumerate(texts)]
        heard, swap_s = Heard(requests), []
        began = time.perf_counter()
        for request in requests:
            self.engine.submit(request, heard)
        for ended in range(1, len(requests) + 1):
            heard.ended.get(timeout=300)
            if name == SWAPS and ended % self.every == 0 and ended < len(requests):
                swap_s.append(self._swap())
        wall_s = heard.last_at - began                  # not when the last swap was done
        units = sum(len(tokens) for tokens in heard.tokens.values())
        assert heard.cpu is not None
        return Run(Block(wall_s, heard.cpu[1] - heard.cpu[0], units), heard, tuple(swap_s))

    def _swap(self) -> float:
        began = time.perf_counter()
        self.engine.set_drafts({ANY_WORKLOAD: next(self._builds)})
        return time.perf_counter() - began


def two_builds(drafts: Drafts) -> tuple[EngineBuild, EngineBuild]:
    """The same weights under two ids, so that the engine loads each anew and outputs can be compared."""
    first = drafts.champion
    return replace(first, build_id="swap-a", draft_version="a"), replace(first, build_id="swap-b", draft_version="b")


def rss_mb() -> float:
    gc.collect()
    return float(psutil.Process().memory_info().rss / 2**20)


def compare(engine: EmbeddedEngine, runs: Mapping[str, Sequence[Run]], prompts: Sequence[Sequence[str]]) -> dict[str, int]:
    """Tokens with swaps against tokens without; a difference must be a near tie of the target's own logits."""
    same, judged = 0, Equivalence()
    for swapped, steady, texts in zip(runs[SWAPS], runs[STEADY], prompts, strict=True):
        for text, with_swaps, without in zip(texts, swapped.heard.tokens.values(), steady.heard.tokens.values(), strict=True):
            if with_swaps == without:
                same += 1
            else:
                for tokens in (with_swaps, without):
                    check_equivalence(engine.target, engine.codec.encode(text), tokens, settings().gate.epsilon, judged)
    total = sum(len(texts) for texts in prompts)
    return {"requests_compared": total, "same_tokens": same, "judged_tokens_of_others": judged.compared, "near_ties": judged.ties,
            "mismatches": judged.mismatches}


def memory(rss: Sequence[float], swaps_per_round: int) -> dict[str, float]:
    slope = float(np.polyfit(range(len(rss)), rss, 1)[0]) if len(rss) > 1 else 0.0
    return {"first_mb": round(rss[0], 1), "last_mb": round(rss[-1], 1), "growth_mb": round(rss[-1] - rss[0], 1),
            "slope_mb_per_100_swaps": round(slope * 100 / max(swaps_per_round, 1), 2)}


def summarise(kept: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    swap_ms = [1e3 * s for run in kept[SWAPS] for s in run.swap_s]
    failed = [reason for some in kept.values() for run in some for reason in run.heard.failed]
    gaps = {name: [run.heard.gaps_ms for run in some] for name, some in kept.items()}
    blocks = {name: [run.block for run in some] for name, some in kept.items()}
    return {"swaps": len(swap_ms), "swap_ms": {"median": round(float(np.median(swap_ms)), 2), "max": round(max(swap_ms), 2)},
            "failed_requests": len(failed), "first_failure": failed[0] if failed else "",
            "versions_served": sorted(set.union(*(run.heard.versions for run in kept[SWAPS]))),
            "gap_ms": {name: {q: round(float(np.quantile(np.concatenate(rows), float(q))), 3) for q in ("0.5", "0.99")}
                       for name, rows in gaps.items()},
            "p99_swaps/steady": quantile_ratio(gaps[SWAPS], gaps[STEADY], 0.99), "swaps/steady": ratio(blocks[SWAPS], blocks[STEADY])}


def measure(args: argparse.Namespace, every: int, warm_up: int) -> dict[str, Any]:
    prompts = prompts_of(args.engine_dir, args.domain, PROMPT_CHARS)
    runs: dict[str, list[Run]] = {STEADY: [], SWAPS: []}
    rss = []
    with drafts_of(args.engine_dir) as drafts, engine_of(args.engine_dir, {ANY_WORKLOAD: drafts.champion}, args.batch) as engine:
        engine.start()
        load = Load(engine, two_builds(drafts), prompts, args.requests, every)
        for round_ in range(warm_up + args.rounds):
            for name in order(list(runs), round_):
                runs[name].append(load.run(name, round_))
            rss.append(rss_mb())
        kept = {name: some[warm_up:] for name, some in runs.items()}
        asked = [pick(prompts, args.requests, round_) for round_ in range(warm_up, warm_up + args.rounds)]
        return {"engine": engine.digest, "batch": args.batch, **summarise(kept), "outputs": compare(engine, kept, asked),
                "engine_failures": engine.stats().requests_failed,
                "memory": memory(rss[warm_up - 1:], (args.requests - 1) // every)}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--domain", default="en")
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--rounds", type=int, default=50, help="pairs of blocks")
    options.add_argument("--swaps", type=int, default=200, help="at least; spread evenly over the blocks")
    options.add_argument("--requests", type=int, default=24, help="in a block")
    args = options.parse_args()
    result = settle()
    if args.quick:
        args.batch, args.rounds, args.swaps, args.requests = 2, 2, 4, 6
    per_round = -(-args.swaps // args.rounds)
    every = (args.requests - 1) // per_round
    if not every:
        options.error(f"{per_round} swaps a round need more than the {args.requests} requests in it: raise --requests or --rounds")
    finish(result | measure(args, every, 1 if args.quick else WARM_UP_ROUNDS), args)


if __name__ == "__main__":
    main()
