"""Benchmark drafts inside one engine, prompt by prompt against no speculation. Knows no registry and no verdict.

Champion and challenger are resident side by side under their own workload tags, and every prompt is run plainly and with
each of them in turn, in alternating order: a ratio compares neighbours in time on the same machine state. That holds for challenger
over champion too, so their ratio is taken prompt by prompt: 8 prompts tell as much as 16 do by way of the two speed-ups (measured on two
cores: intervals of 0.28 to 0.64 on the log scale against 0.37 to 0.55). Plain decoding accepts nothing, so its time per token is the
machine's more than the prompt's: beside two drafts, which are compared with each other, every second prompt does without it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from tide_pipeline.config import GateSettings, ServeSettings, SpeculationSettings
from tide_pipeline.contracts import BenchmarkReport, EngineBuild, GenerationRequest, SamplingParams
from tide_pipeline.engine.embedded import EmbeddedEngine
from tide_pipeline.engine_spec import EngineSpec
from tide_pipeline.gate.equivalence import Equivalence, check_equivalence

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
class Bench:
    """Timed runs by tag ("plain" and one per build), in the order of prompts; plain decoding of the prompts `plainly` alone.

    Equivalence of the tags it was asked for.
    """

    runs: dict[str, list[Run]] = field(default_factory=dict)
    plainly: list[int] = field(default_factory=list)
    equivalence: dict[str, Equivalence] = field(default_factory=dict)


def benchmark_builds(model_dir: Path, spec: EngineSpec, builds: Mapping[str, EngineBuild], prompts: Sequence[str], gate: GateSettings,
                     speculation: SpeculationSettings, serve: ServeSettings | None = None, *, timed: int | None = None,
                     checked: Sequence[str] | None = None, temperature: float = 0.0, mode: str = "auto",
                     progress: Callable[[int, int], None] | None = None) -> Bench:
    """Run prompts plainly and with each build, one request at a time.

    The first `timed` prompts (None: all) are timed. The rest are run with the `checked` tags (None: all) alone, whose greedy outputs on
    `gate.equivalence_prompts` of all prompts are held against the target's. Every build learns from the same few prompts before its
    first timed one; what is only checked comes after the last.
    """
    engine = EmbeddedEngine(model_dir, spec, serve or ServeSettings(max_batch=1), speculation)
    engine.set_drafts(dict(builds))
    engine.profile()
    engine.start()
    tags = [PLAIN, *builds]
    several = prompts[:timed]
    plainly = [i for i in range(len(several)) if len(builds) == 1 or i % 4 in (0, 3)]  # beside two: first for one prompt, last for another
    bench = Bench({tag: [] for tag in tags}, plainly, {tag: Equivalence() for tag in (tags if checked is None else checked)})
    rest = prompts[len(several) : gate.equivalence_prompts]
    first = [*rest, *several][: max(2, len(several) // 4)]
    run = partial(_run, engine, tokens=gate.bench_tokens, temperature=temperature, mode=mode)
    try:
        warm = {tag: [run(f"{tag}-warm-{i}", prompt, tag) for i, prompt in enumerate(first)] for tag in reversed([*builds])}
        for i, prompt in enumerate(several):
            for tag in (tags if i % 2 == 0 else reversed(tags)):
                if tag != PLAIN or i in plainly:
                    bench.runs[tag].append(run(f"{tag}-{i}", prompt, tag))
            if progress:
                progress(i + 1, len(several))
        untimed = {tag: warm.get(tag, [])[: len(rest)] for tag in bench.equivalence}
        for tag, done in untimed.items():
            done += [run(f"{tag}-rest-{i}", rest[i], tag) for i in range(len(done), len(rest))]
    finally:
        engine.close()
    if temperature == 0.0:
        for tag, found in bench.equivalence.items():
            mine = [several[i] for i in plainly] if tag == PLAIN else several
            outputs = list(zip([*mine, *rest], bench.runs[tag] + untimed[tag], strict=True))[: gate.equivalence_prompts]
            known = {several[i]: run.tokens for i, run in zip(plainly, bench.runs[PLAIN], strict=True)} if tag != PLAIN else {}
            for prompt, one in outputs:
                check_equivalence(engine.target, engine.codec.encode(prompt), one.tokens, gate.epsilon, found, known.get(prompt, ()))
    return bench


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


def summarise(bench: Bench, tag: str, build: EngineBuild, against: str = "") -> BenchmarkReport:
    """The record of one build; `against` is the tag of the one it shall replace."""
    runs, plain = bench.runs[tag], bench.runs[PLAIN]
    speedup, low, high = faster(plain, [runs[i] for i in bench.plainly])
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
