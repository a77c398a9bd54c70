"""Measure what speculation is worth right now, from outside: paired requests over HTTP. Knows the client, not the engine.

One request at a time, each prompt in every mode in turn (off, auto, fixed), order rotating from prompt to prompt. A
speed-up is the median over prompts of (seconds per token without speculation) / (seconds per token with it).
"""

from __future__ import annotations

import statistics
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tide_pipeline.contracts import GenerationRequest, SamplingParams
from tide_pipeline.serve.client import GenerationResult, TritonClient
from tide_pipeline.workloads.loops import is_looping
from tide_pipeline.workloads.prompts import Prompt

OFF, AUTO = "off", "auto"


@dataclass(frozen=True)
class Ratio:
    """Median over prompts with its bootstrap 95 % interval."""

    median: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Split:
    """One row of a phase's table: a subset of prompts at one temperature."""

    name: str                      # e.g. "greedy, non-looping"
    acceptance_length: float       # at the fixed draft length, by step
    tokens_per_s: float            # with "auto", median
    plain_tokens_per_s: float
    speedup: Ratio
    speedup_fixed: Ratio


@dataclass
class PhaseMeasurement:
    """All paired requests of one phase."""

    name: str
    fixed: str
    tokenize: Callable[[str], Sequence[int]]
    pairs: dict[float, list[dict[str, GenerationResult]]] = field(default_factory=dict)      # temperature -> mode -> result
    failed: int = 0

    def splits(self) -> list[Split]:
        """Greedy and sampled, each all / non-looping / looping where there are prompts."""
        out = []
        for temperature, pairs in sorted(self.pairs.items()):
            how = "greedy" if temperature == 0 else f"temperature {temperature:g}"
            loops = [is_looping(self.tokenize(pair[OFF].text)) for pair in pairs]
            for name, chosen in (("all", pairs), ("non-looping", [p for p, looping in zip(pairs, loops, strict=True) if not looping]),
                                 ("looping", [p for p, looping in zip(pairs, loops, strict=True) if looping])):
                if chosen:
                    out.append(self._split(f"{how}, {name}", chosen))
        return out

    def headline(self) -> Split:
        """Greedy non-looping text; all greedy text when every output looped."""
        splits = self.splits()
        return next((s for s in splits if s.name == "greedy, non-looping"), splits[0])

    def _split(self, name: str, pairs: Sequence[dict[str, GenerationResult]]) -> Split:
        fixed = [pair[self.fixed] for pair in pairs]
        verified = sum(r.verify_steps for r in fixed)
        return Split(name, 1.0 + sum(r.accepted for r in fixed) / verified if verified else 1.0,
                     statistics.median(p[AUTO].num_output_tokens / p[AUTO].seconds for p in pairs),
                     statistics.median(p[OFF].num_output_tokens / p[OFF].seconds for p in pairs),
                     ratio([per_token(p[OFF]) / per_token(p[AUTO]) for p in pairs]),
                     ratio([per_token(p[OFF]) / per_token(p[self.fixed]) for p in pairs]))

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: the headline's figures under the names users read, every split below."""
        head = self.headline()
        return {"name": self.name, "acceptance_length": round(head.acceptance_length, 3), "tokens_per_s": round(head.tokens_per_s, 1),
                "plain_tokens_per_s": round(head.plain_tokens_per_s, 1), "speedup": round(head.speedup.median, 3),
                "speedup_low": round(head.speedup.low, 3), "speedup_high": round(head.speedup.high, 3),
                "speedup_fixed": round(head.speedup_fixed.median, 3), "text": head.name, "prompts": head.speedup.n,
                "splits": [{"name": s.name, "prompts": s.speedup.n, "acceptance_length": round(s.acceptance_length, 3),
                            "tokens_per_s": round(s.tokens_per_s, 1), "plain_tokens_per_s": round(s.plain_tokens_per_s, 1),
                            "speedup": round(s.speedup.median, 3), "speedup_low": round(s.speedup.low, 3),
                            "speedup_high": round(s.speedup.high, 3), "speedup_fixed": round(s.speedup_fixed.median, 3)}
                           for s in self.splits()]}


def measure_phase(client: TritonClient, name: str, prompts: Sequence[Prompt], *, tokenize: Callable[[str], Sequence[int]], tokens: int,
                  fixed: str = "3", sampled_share: int = 3, workload: str = "default",
                  progress: Callable[[int, int], None] = lambda done, total: None) -> PhaseMeasurement:
    """Every prompt greedily in all modes; every `sampled_share`-th also at temperature 0.8. One warm-up prompt first."""
    phase, modes = PhaseMeasurement(name, fixed, tokenize), [OFF, AUTO, fixed]
    plan = [(0.0, p) for p in prompts] + [(0.8, p) for p in prompts[::sampled_share]]
    for mode in modes:
        _ask(client, prompts[0].text, tokens, 0.0, mode, workload)
    for i, (temperature, prompt) in enumerate(plan):
        order = modes[i % 3 :] + modes[: i % 3]
        pair = {mode: _ask(client, prompt.text, tokens, temperature, mode, workload) for mode in (order if i % 2 else order[::-1])}
        if any(r.finish_reason not in ("length", "stop") or not r.num_output_tokens for r in pair.values()):
            phase.failed += 1
        else:
            phase.pairs.setdefault(temperature, []).append(pair)
        progress(i + 1, len(plan))
    return phase


def per_token(result: GenerationResult) -> float:
    """Seconds a token, the prompt included."""
    return result.seconds / result.num_output_tokens


def ratio(values: Sequence[float], seed: int = 0) -> Ratio:
    data = np.asarray(values, dtype=float)
    medians = np.median(np.random.default_rng(seed).choice(data, (1000, len(data))), axis=1)
    return Ratio(float(np.median(data)), float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975)), len(data))


def _ask(client: TritonClient, text: str, tokens: int, temperature: float, mode: str, workload: str) -> GenerationResult:
    sampling = SamplingParams(max_tokens=tokens, temperature=temperature, seed=7, ignore_eos=True)
    return client.generate(GenerationRequest(f"measure-{uuid.uuid4().hex[:12]}", text, sampling, mode, workload, "measure"))
