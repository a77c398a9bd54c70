"""Benchmark drafts inside one engine, prompt by prompt against no speculation. Knows no registry and no verdict.

Champion and challenger are resident side by side under their own workload tags, and every prompt is run plainly and with
each of them in turn, in alternating order: a ratio compares neighbours in time on the same machine state. That holds for challenger
over champion too, so their ratio is taken prompt by prompt: 8 prompts tell as much as 16 do by way of the two speed-ups (measured on two
cores: intervals of 0.28 to 0.64 on the log scale against 0.37 to 0.55).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tide_pipeline.config import GateSettings, ServeSettings, SpeculationSettings
from tide_pipeline.contracts import BenchmarkReport, EngineBuild, GenerationRequest, SamplingParams
from tide_pipeline.engine.embedded import EmbeddedEngine
from tide_pipeline.engine_spec import EngineSpec
from tide_pipeline.models.target import Target

PLAIN = "plain"


@dataclass(frozen=True)
class Run:
    """One request, timed from submission to its end."""

    tokens: tuple[int, ...]
    seconds: float
    drafted: int
    accepted: int
    verify_steps: int
    target_steps: int
    gaps_ms: tuple[float, ...]       # between chunks


@dataclass
class Equivalence:
    """Greedy equivalence: every token is the argmax of a plain pass over the same prefix, or within epsilon of it."""

    compared: int = 0
    ties: int = 0
    mismatches: int = 0


@dataclass
class Bench:
    """Timed runs by tag ("plain" and one per build), index by prompt. Equivalence of the tags it was asked for."""

    runs: dict[str, list[Run]] = field(default_factory=dict)
    equivalence: dict[str, Equivalence] = field(default_factory=dict)


def benchmark_builds(model_dir: Path, spec: EngineSpec, builds: Mapping[str, EngineBuild], prompts: Sequence[str], gate: GateSettings,
                     speculation: SpeculationSettings, serve: ServeSettings | None = None, *, timed: int | None = None,
                     checked: Sequence[str] | None = None, temperature: float = 0.0, mode: str = "auto",
                     progress: Callable[[int, int], None] | None = None) -> Bench:
    """Run prompts plainly and with each build, one request at a time.

    The first `timed` prompts (None: all) are timed; the rest are only run with the `checked` tags (None: all), to warm up. Greedy outputs
    of `checked` on `gate.equivalence_prompts` of all prompts are held against the target's.
    """
    engine = EmbeddedEngine(model_dir, spec, serve or ServeSettings(max_batch=1), speculation)
    engine.set_drafts(dict(builds))
    engine.profile()
    engine.start()
    tags = [PLAIN, *builds]
    bench = Bench({tag: [] for tag in tags}, {tag: Equivalence() for tag in (tags if checked is None else checked)})
    several, rest = prompts[:timed], prompts[len(prompts[:timed]) : gate.equivalence_prompts]
    untimed = dict[str, list[Run]]()
    run = partial(_run, engine, tokens=gate.bench_tokens, temperature=temperature, mode=mode)
    try:
        for tag in reversed(tags):                         # warms up as well: the engine, and each build's controller
            untimed[tag] = [run(f"{tag}-rest-{i}", prompt, tag) for i, prompt in enumerate(rest if tag in bench.equivalence else ())]
            for i, prompt in enumerate(several[: max(0, _warm_ups(tag, several) - len(untimed[tag]))]):
                run(f"{tag}-warm-{i}", prompt, tag)
        for i, prompt in enumerate(several):
            for tag in (tags if i % 2 == 0 else reversed(tags)):
                bench.runs[tag].append(run(f"{tag}-{i}", prompt, tag))
            if progress:
                progress(i + 1, len(several))
    finally:
        engine.close()
    if temperature == 0.0:
        plain = {prompt: one.tokens for prompt, one in zip(several, bench.runs[PLAIN], strict=True)}
        for tag, found in bench.equivalence.items():
            for prompt, one in list(zip([*several, *rest], bench.runs[tag] + untimed[tag], strict=True))[: gate.equivalence_prompts]:
                known = plain.get(prompt, ()) if tag != PLAIN else ()
                check_equivalence(engine.target, engine.codec.encode(prompt), one.tokens, gate.epsilon, found, known)
    return bench


def _warm_ups(tag: str, prompts: Sequence[str]) -> int:
    """Without a draft there is nothing to learn, and the engine is warm from the others' runs, which come first."""
    return max(2, len(prompts) // 4) if tag != PLAIN else 0


def _run(engine: EmbeddedEngine, name: str, prompt: str, tag: str, *, tokens: int, temperature: float, mode: str) -> Run:
    speculation = "off" if tag == PLAIN else mode
    sampling = SamplingParams(max_tokens=tokens, temperature=temperature, seed=17, ignore_eos=True)
    began = last = time.perf_counter()
    ids: list[int] = []
    gaps = []
    stream = engine.submit(GenerationRequest(name, prompt, sampling, speculation, tag))
    for chunk in stream:
        now = time.perf_counter()
        gaps.append((now - last) * 1e3)
        last = now
        ids += chunk.token_ids
    return Run(tuple(ids), last - began, chunk.drafted_tokens, chunk.accepted_tokens, chunk.verify_steps, chunk.target_steps,
               tuple(gaps[1:]))


@torch.inference_mode()
def check_equivalence(target: Target, prompt: Sequence[int], output: Sequence[int], epsilon: float, into: Equivalence,
                      plain: Sequence[int] = ()) -> None:
    """One plain pass over prompt and output judges every output token. Where plain decoding gave the same output, that was the pass."""
    if tuple(output) == tuple(plain):
        into.compared += len(output)
        return
    ids = torch.tensor([[*prompt, *output]])
    T = ids.shape[1]
    _, final = target.forward(ids, torch.arange(T).unsqueeze(0), target.new_cache(1, T))
    logits = target.logits(final[0, len(prompt) - 1 : -1])
    best = logits.max(dim=-1).values
    chosen = logits.gather(1, torch.tensor(output).unsqueeze(1))[:, 0]
    gap = best - chosen
    into.compared += len(output)
    into.ties += int(((gap > 0) & (gap <= epsilon)).sum())
    into.mismatches += int((gap > epsilon).sum())


def summarise(bench: Bench, tag: str, build: EngineBuild, against: str = "") -> BenchmarkReport:
    """The record of one build; `against` is the tag of the one it shall replace."""
    runs, plain = bench.runs[tag], bench.runs[PLAIN]
    speedup, low, high = faster(plain, runs)
    over_champion = faster(bench.runs[against], runs) if against else (0.0, 0.0, 0.0)
    steps = sum(r.target_steps for r in runs)
    equal = bench.equivalence.get(tag, Equivalence())
    return BenchmarkReport(
        build_id=build.build_id, draft_version=build.draft_version,
        acceptance_length=acceptance_length(runs) if steps else 0.0,
        tokens_per_s=statistics.median(len(r.tokens) / r.seconds for r in runs),
        plain_tokens_per_s=statistics.median(len(r.tokens) / r.seconds for r in plain),
        speedup=speedup, speedup_low=low, speedup_high=high,
        itl_p99_ms=float(np.quantile([gap for r in runs for gap in r.gaps_ms] or [0.0], 0.99)), prompts=len(runs),
        compared_tokens=equal.compared, ties=equal.ties, mismatches=equal.mismatches, over_champion=over_champion)


def faster(old: Sequence[Run], new: Sequence[Run], seed: int = 0) -> tuple[float, float, float]:
    """Median over prompts of old time / new time, and the ends of its 95 % interval by bootstrap."""
    ratios = np.array([a.seconds / len(a.tokens) / (b.seconds / len(b.tokens)) for a, b in zip(old, new, strict=True)])
    medians = np.median(np.random.default_rng(seed).choice(ratios, (1000, len(ratios))), axis=1)
    return float(np.median(ratios)), float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def acceptance_length(runs: Sequence[Run]) -> float:
    """Tokens per verification step, bonus token included; by step, not by request. 1.0 where nothing was drafted."""
    verified = sum(r.verify_steps for r in runs)
    return 1.0 + sum(r.accepted for r in runs) / verified if verified else 1.0
