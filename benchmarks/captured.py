"""A lake for the training benchmarks: the shipped draft serves prompts of some domains while the real Recorder writes. Times nothing."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_engine import ask, drafts_of, engine_of, prompts_of, serve

from tide_pipeline.capture.recorder import Recorder
from tide_pipeline.config import CaptureSettings, TideConfig, override
from tide_pipeline.engine_spec import load_engine_spec
from tide_pipeline.recipes import load

BATCH = 8
GROUP = 64                         # requests submitted at a time: each must end within its deadline
SAMPLED_EACH = 5                   # one request in so many samples at 0.8, the others are greedy
TOKENS = 96


def captured_run(args: argparse.Namespace, scratch: Path, requests: int, training: Mapping[str, Any]) -> tuple[TideConfig, Path]:
    """Settings to train on `--state`, or else on a lake just captured from so many requests; and the shipped champion's folder."""
    values = {"state_dir": str(args.state or scratch / "state"), "engines_dir": str(args.engine_dir.parent), "engine": args.engine_dir.name}
    always = {"time_budget_s": 0.0, "nice": 0, "min_prompts": 2, "eval_share": 0.3 if args.quick else 0.12}
    config = override(load(values=values), {"training": {**always, **training}})
    if args.state is None:
        fill_lake(config, {args.workload: 24 if args.quick else requests}, 24 if args.quick else TOKENS)
    return config, args.engine_dir / load_engine_spec(args.engine_dir).champion


def fill_lake(config: TideConfig, requests: Mapping[str, int], tokens: int = TOKENS) -> int:
    """Serve so many prompts of each domain, its tag the domain's name, into the state directory's lake; returns the captured rows."""
    spec = load_engine_spec(config.engine_dir)
    queue = sum(requests.values()) + 1                               # a window that is dropped would make another lake of it
    recorder = Recorder(CaptureSettings(mode="on", queue_windows=queue), spec.name, config.state.lake, "bench")
    with drafts_of(config.engine_dir) as drafts, engine_of(config.engine_dir, {"*": drafts.champion}, BATCH, recorder) as engine:
        for domain, count in requests.items():
            asked = [ask(text, tokens, "auto", domain, 0.8 if i % SAMPLED_EACH == SAMPLED_EACH - 1 else 0.0)
                     for i, text in enumerate(_in_turn(prompts_of(config.engine_dir, domain), count))]
            for first in range(0, count, GROUP):
                serve(engine, asked[first : first + GROUP])
    stats = recorder.stats()
    if stats["dropped_tokens"]:
        raise RuntimeError(f"{stats['dropped_tokens']} rows were not captured: look at the recorder's log")
    return int(stats["captured_tokens"])


def _in_turn(prompts: Sequence[str], count: int) -> list[str]:
    if count > len(prompts):
        raise ValueError(f"{count} different prompts wanted, the domain ships {len(prompts)}")
    return list(prompts[:count])
