"""A lake for the training benchmarks: the shipped draft serves prompts of some domains while the real Recorder writes. Times nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench_engine import ask, drafts_of, engine_of, prompts_of, serve

from tide_pipeline.capture.recorder import Recorder
from tide_pipeline.config import CaptureSettings, TideConfig
from tide_pipeline.engine_spec import load_engine_spec

BATCH = 8
GROUP = 64                         # requests submitted at a time: each must end within its deadline
SAMPLED_EACH = 5                   # one request in so many samples at 0.8, the others are greedy
TOKENS = 96


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
