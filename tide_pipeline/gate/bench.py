"""Benchmark drafts inside one engine, prompt by prompt against no speculation. Knows no registry and no verdict.

Champion and challenger are resident side by side under their own workload tags, and every prompt is run plainly and with
each of them in turn, in alternating order: a ratio compares neighbours in time on the same machine state.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
    """Runs by tag ("plain" and one per build), index by prompt."""

    runs: dict[str, list[Run]] = field(default_factory=dict)
    equivalence: dict[str, Equivalence] = field(default_factory=dict)


def benchmark_builds(model_dir: Path, spec: EngineSpec, builds: Mapping[str, EngineBuild], prompts: Sequence[str], gate: GateSettings,
                     speculation: SpeculationSettings, serve: ServeSettings | None = None, *, temperature: float = 0.0,
                     mode: str = "auto", progress: Callable[[int, int], None] | None = None) -> Bench:
    """Run every prompt plainly and with each build, one request at a time."""
    engine = EmbeddedEngine(model_dir, spec, serve or ServeSettings(max_batch=1), speculation)
    engine.set_drafts(dict(builds))
    engine.profile()
    engine.start()
    tags = [PLAIN, *builds]
    bench = Bench({tag: [] for tag in tags}, {tag: Equivalence() for tag in tags})
    try:
        for tag in tags:                                                       # warm up, and let the controller learn
            for prompt in prompts[: max(2, len(prompts) // 4)]:
                _run(engine, f"warm-{tag}-{len(prompt)}", prompt, tag, gate.bench_tokens, temperature, mode)
        for i, prompt in enumerate(prompts):
            for tag in (tags if i % 2 == 0 else reversed(tags)):
                bench.runs[tag].append(_run(engine, f"{tag}-{i}", prompt, tag, gate.bench_tokens, temperature, mode))
            if progress:
                progress(i + 1, len(prompts))
    finally:
        engine.close()
    if temperature == 0.0:
        for tag in tags:
            for prompt, run in list(zip(prompts, bench.runs[tag], strict=True))[: gate.equivalence_prompts]:
                check_equivalence(engine.target, engine.codec.encode(prompt), run.tokens, gate.epsilon, bench.equivalence[tag])
    return bench


def _run(engine: EmbeddedEngine, name: str, prompt: str, tag: str, tokens: int, temperature: float, mode: str) -> Run:
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
def check_equivalence(target: Target, prompt: Sequence[int], output: Sequence[int], epsilon: float, into: Equivalence) -> None:
    """One plain pass over prompt and output judges every output token."""
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


def summarise(bench: Bench, tag: str, build: EngineBuild, seed: int = 0) -> BenchmarkReport:
    """The record of one build. Speed-up is the median over prompts of plain time / its time, with a bootstrap interval."""
    runs, plain = bench.runs[tag], bench.runs[PLAIN]
    ratios = np.array([p.seconds / len(p.tokens) / (r.seconds / len(r.tokens)) for p, r in zip(plain, runs, strict=True)])
    rng = np.random.default_rng(seed)
    medians = np.median(rng.choice(ratios, (1000, len(ratios))), axis=1)
    steps = sum(r.target_steps for r in runs)
    equal = bench.equivalence[tag]
    return BenchmarkReport(
        build_id=build.build_id, draft_version=build.draft_version,
        acceptance_length=acceptance_length(runs) if steps else 0.0,
        tokens_per_s=statistics.median(len(r.tokens) / r.seconds for r in runs),
        plain_tokens_per_s=statistics.median(len(r.tokens) / r.seconds for r in plain),
        speedup=float(np.median(ratios)), speedup_low=float(np.quantile(medians, 0.025)), speedup_high=float(np.quantile(medians, 0.975)),
        itl_p99_ms=float(np.quantile([gap for r in runs for gap in r.gaps_ms] or [0.0], 0.99)), prompts=len(runs),
        compared_tokens=equal.compared, ties=equal.ties, mismatches=equal.mismatches)


def acceptance_length(runs: Sequence[Run]) -> float:
    """Tokens per verification step, bonus token included; by step, not by request. 1.0 where nothing was drafted."""
    verified = sum(r.verify_steps for r in runs)
    return 1.0 + sum(r.accepted for r in runs) / verified if verified else 1.0
