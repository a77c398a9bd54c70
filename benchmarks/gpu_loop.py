"""The whole loop by hand on a GPU: a target of some 100M parameters is trained, served, captured, its draft trained and swapped.

    python benchmarks/gpu_loop.py --corpus .work/corpus --json benchmarks/results/gpu_loop.json     some 20 minutes of a GPU (estimate)
    python benchmarks/gpu_loop.py --quick                                                          tiny, on the CPU: shows only that it runs
    python benchmarks/gpu_loop_plot.py benchmarks/results/gpu_loop.json docs/images/gpu_loop.svg   the picture, where there is matplotlib

    target      by the pocket target's recipe, from the same text, for --minutes
    stale       a draft trained from scratch on captured traffic of `en` (the target alone serves it)
    adapted     traffic of `html`, which it has never seen, is served with the stale draft and captured; the draft is trained on it
    serving     html at batch 1, 8, 64: tokens/s without a draft, with the stale and with the adapted one (the controller chooses
                lengths), in alternating blocks of the same populations; acceptance length at a fixed draft length of 3, on held-out text
    swap        the adapted draft replaces the stale one under requests in flight; every answer is compared with the target's alone
    training    rows/s of a step on stored states, and against recomputing them with the target (recompute.py)
    capture     recording against a ring that keeps nothing, in alternating blocks (gpu_engine.py)

Needs torch, pyarrow, safetensors, tokenizers and numpy only. NOT YET RUN ON A GPU: only its --quick form has run, on a CPU.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from abba import Block, Work, alternate, median_rate, ratio
from bench_engine import Population, ask, count, serve
from gpu_engine import CaptureBench
from loop_target import ENGINE, PROMPT_TOKENS, full_size, make_engine, prompts, quick_size, shipped_text
from options import finish, parser, settle
from recompute import measure as stored_against_recomputed

from tide_pipeline.capture.recorder import Recorder
from tide_pipeline.config import CaptureSettings, ServeSettings, TideConfig, override
from tide_pipeline.contracts import EngineBuild
from tide_pipeline.engine.embedded import EmbeddedEngine
from tide_pipeline.engine.protocol import Sink
from tide_pipeline.engine_spec import load_engine_spec
from tide_pipeline.models.checkpoint import digest_draft
from tide_pipeline.models.device import device_of
from tide_pipeline.models.target import Target
from tide_pipeline.recipes import load
from tide_pipeline.training.loop import train_draft

OLD, NEW = "en", "html"
OFF, STALE, ADAPTED = "off", "stale", "adapted"
ACCEPTANCE_LENGTH = "3"            # the fixed draft length at which acceptance is compared
SLACK = 16                         # positions: a prompt may be tokenized longer than the ids it was cut from


@dataclass(frozen=True)
class Amounts:
    """How much of everything."""

    batches: tuple[int, ...]
    requests: int                  # captured of each domain
    tokens: int                    # of an answer
    waves: int                     # populations of a batch size, each with prompts of its own
    rounds: int                    # blocks of a population
    block: int                     # tokens of a block, of each request
    train_s: float
    held_out: int                  # prompts of the acceptance figures


FULL = Amounts((1, 8, 64), 1_500, 96, 4, 8, 15, 120.0, 64)
QUICK = Amounts((1, 2), 12, 16, 1, 2, 6, 2.0, 4)


class Loop:
    """The target on its device, and the folders of lake and drafts."""

    def __init__(self, args: argparse.Namespace, corpus: Path, folder: Path, amounts: Amounts) -> None:
        self.amounts, self.folder, self.corpus, self.device = amounts, folder, corpus, args.device
        sizes = {"eval_share": 0.3, "eval_windows": 4} if args.quick else {"batch_windows": 32, "window_rows": 256}
        self.config = override(load(values={"engine": ENGINE, "engines_dir": str(folder), "state_dir": str(folder / "state")}), {
            "training": {"device": args.device, "time_budget_s": amounts.train_s, "nice": 0, "min_prompts": 2, **sizes}})
        self.spec = load_engine_spec(self.config.engine_dir)
        self.model = self.config.engine_dir / self.spec.model
        self.target = Target(self.model, self.spec, device_of(args.device))

    @contextmanager
    def engine(self, build: EngineBuild | None, max_batch: int, sink: Sink | None = None) -> Any:
        """Over the one target; profiled if it has a draft."""
        serving = ServeSettings(self.device, max_batch=max_batch, queue_size=10_000)
        engine = EmbeddedEngine(self.model, self.spec, serving, self.config.speculation, sink, self.target)
        try:
            if build is not None:
                engine.set_drafts({"*": build})
                engine.profile()
            yield engine
        finally:
            engine.close()

    def prompts(self, domain: str, split: str, count: int, seed: int = 0) -> list[str]:
        return prompts(self.model / "tokenizer.json", self.corpus, domain, split, count, seed)

    def capture(self, domain: str, build: EngineBuild | None) -> dict[str, float]:
        """Serve training text of a domain and keep everything."""
        settings = CaptureSettings(mode="on", max_bytes_per_hour=10**12, queue_windows=10**6)
        recorder = Recorder(settings, ENGINE, self.config.state.lake, "bench")
        batch, a = max(self.amounts.batches), self.amounts
        with self.engine(build, batch, recorder) as engine:
            began, wrote = time.perf_counter(), 0
            for texts in in_groups(self.prompts(domain, "train", a.requests), 4 * batch):
                wrote += count(serve(engine, [ask(text, a.tokens, "auto" if build else "off", domain, 0.8 if i % 5 == 4 else 0.0)
                                              for i, text in enumerate(texts)]))
            seconds = time.perf_counter() - began
        stats = recorder.stats()
        return {"seconds": round(seconds, 2), "tokens_per_s": round(wrote / seconds, 1), "captured_rows": int(stats["captured_tokens"]),
                "dropped_rows": int(stats["dropped_tokens"])}

    def train(self, domain: str, name: str, champion: EngineBuild | None) -> tuple[EngineBuild, dict[str, Any]]:
        out = self.folder / name / "draft"
        made = train_draft(self.config, workload=domain, out_dir=out, champion=Path(champion.path) / "draft" if champion else None)
        digest = digest_draft(out)
        build = EngineBuild(digest[:16], ENGINE, "embedded", str(out.parent), name, digest, self.target.digest, time.time())
        return build, {"steps": made.steps, "train_s": made.train_s, "windows": made.num_windows, "rows": made.num_rows,
                       "offline_acceptance_length": round(made.acceptance_length, 4)}


def in_groups(texts: Sequence[str], size: int) -> list[Sequence[str]]:
    return [texts[i : i + size] for i in range(0, len(texts), size)]


def accepted(loop: Loop, build: EngineBuild, domain: str) -> float:
    """Tokens per verification step at a fixed draft length, greedy, held-out prompts."""
    with loop.engine(build, 8) as engine:
        before = engine.stats()
        for texts in in_groups(loop.prompts(domain, "heldout", loop.amounts.held_out), 32):
            serve(engine, [ask(text, loop.amounts.tokens, ACCEPTANCE_LENGTH) for text in texts])
        after = engine.stats()
    steps = max(after.verify_steps - before.verify_steps, 1)
    return round(1 + (after.accepted_tokens - before.accepted_tokens) / steps, 4)


def speeds(loop: Loop, builds: dict[str, EngineBuild], batch: int) -> dict[str, Any]:
    """One population after another at this batch size, each in three engines that take turns."""
    a = loop.amounts
    with ExitStack() as stack:
        engines = {OFF: stack.enter_context(loop.engine(None, batch))} | {
            name: stack.enter_context(loop.engine(build, batch)) for name, build in builds.items()}
        blocks: dict[str, list[Block]] = {name: [] for name in engines}
        for wave in range(a.waves):
            texts = loop.prompts(NEW, "heldout", batch, seed=1 + wave)
            for name, some in advance_in_turn(engines, texts, a).items():
                blocks[name] += some
    return {"batch": batch, "tokens_per_s": {name: median_rate(some) for name, some in blocks.items()},
            **{f"{name}/off": ratio(blocks[name], blocks[OFF]) for name in builds}, "adapted/stale": ratio(blocks[ADAPTED], blocks[STALE])}


def advance_in_turn(engines: dict[str, EmbeddedEngine], texts: Sequence[str], a: Amounts) -> dict[str, list[Block]]:
    """Blocks of one population; the first round is not timed. Requests may run ahead of each other as far as the context goes."""
    longest = next(iter(engines.values())).positions - PROMPT_TOKENS[1] - SLACK
    people = {name: Population(engine, [ask(text, longest, OFF if name == OFF else "auto") for text in texts])
              for name, engine in engines.items()}
    goals = {name: itertools.count(1) for name in engines}

    def work_of(name: str) -> Work:
        return lambda _round: people[name].advance_to(next(goals[name]) * a.block * len(texts))

    works = {name: work_of(name) for name in engines}
    alternate(works, 1)
    blocks = alternate(works, a.rounds)
    for some in people.values():
        some.leave()
    return blocks


def swap(loop: Loop, builds: dict[str, EngineBuild], batch: int) -> dict[str, Any]:
    """Change the draft while requests run, and compare what they wrote with the target's own answers."""
    a = loop.amounts
    texts = loop.prompts(NEW, "heldout", 2 * batch, seed=99)
    with loop.engine(None, batch) as plain:
        wanted = serve(plain, [ask(text, a.tokens, "off") for text in texts])
    with loop.engine(builds[STALE], batch) as engine:
        answers: list[list[int]] = [[] for _ in texts]
        for i, text in enumerate(texts):
            engine.submit(ask(text, a.tokens, ACCEPTANCE_LENGTH), lambda chunk, i=i: answers[i].extend(chunk.token_ids))
        while count(answers) < batch * a.tokens // 2 and engine.stats().requests_failed == 0:
            engine.step()
        began = time.perf_counter()
        engine.set_drafts({"*": builds[ADAPTED]})
        took_ms = (time.perf_counter() - began) * 1e3
        while (stats := engine.stats()).running + stats.waiting:
            engine.step()
    same = sum(ours == plain for ours, plain in zip(answers, wanted, strict=True))
    return {"set_drafts_ms": round(took_ms, 2), "requests": len(texts), "failed": stats.requests_failed, "same_answers_as_plain": same}


def train_all(args: argparse.Namespace, folder: Path, amounts: Amounts) -> tuple[Loop, dict[str, EngineBuild], dict[str, Any]]:
    """Everything up to the two drafts."""
    corpus, size = args.corpus, full_size(args.minutes)
    if args.quick:
        corpus, size = folder / "corpus", quick_size()
        shipped_text(args.engine_dir, corpus)
    result: dict[str, Any] = {"target": make_engine(args.engine_dir, corpus, folder, size, args.device)}
    loop = Loop(args, corpus, folder, amounts)
    result["capture_old"] = loop.capture(OLD, None)
    stale, result["train_stale"] = loop.train(OLD, STALE, None)
    result["capture_new"] = loop.capture(NEW, stale)
    adapted, result["train_adapted"] = loop.train(NEW, ADAPTED, stale)
    return loop, {STALE: stale, ADAPTED: adapted}, result


def capture_cost(loop: Loop, rounds: int, tokens: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(dir=loop.folder) as lake:
        bench = CaptureBench(loop.target, Path(lake), loop.device, max(loop.amounts.batches), loop.spec.max_context, loop.spec)
        try:
            return [bench.measure(batch, rounds, tokens) for batch in loop.amounts.batches]
        finally:
            bench.engine.close()


def depths(config: TideConfig, champion: Path, quick: bool, scratch: Path) -> list[dict[str, Any]]:
    settings = override(config, {"training": {"time_budget_s": 0.0}})
    rounds, all_depths = (2, (1,)) if quick else (32, (1, 3, 4))
    return [stored_against_recomputed(settings, NEW, champion, ttt, rounds, 1, scratch) for ttt in all_depths]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--device", help="as serve.device; without it cuda, or cpu with --quick")
    options.add_argument("--corpus", type=Path, default=Path(".work/corpus"), help="folder with <domain>.<split>.npy")
    options.add_argument("--minutes", type=float, default=6.0, help="training time of the target")
    options.add_argument("--work", type=Path, help="where the temporary folder with target, lake and drafts goes")
    args = options.parse_args()
    args.device = args.device or ("cpu" if args.quick else "cuda")
    result, amounts = settle() | {"device": args.device}, QUICK if args.quick else FULL
    device_of(args.device)                                       # before minutes of training: is it there?
    with tempfile.TemporaryDirectory(prefix="tide-gpu-loop-", dir=args.work) as scratch:
        loop, builds, made = train_all(args, Path(scratch), amounts)
        result |= made
        result["acceptance_length"] = {name: {domain: accepted(loop, build, domain) for domain in (NEW, OLD)}
                                       for name, build in builds.items()}
        result["serving"] = [speeds(loop, builds, batch) for batch in amounts.batches]
        result["swap"] = swap(loop, builds, amounts.batches[1])
        result["training"] = depths(loop.config, Path(builds[STALE].path) / "draft", args.quick, Path(scratch))
        result["capture"] = capture_cost(loop, 2 if args.quick else 30, 4 if args.quick else 6)
    if torch.cuda.is_available():
        result["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    finish(result, args)


if __name__ == "__main__":
    main()
