"""Start an engine on a new draft and let it say something: proof that it loads, and how it ran. Knows no build folders."""

from __future__ import annotations

import dataclasses
import time

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import ANY_WORKLOAD, EngineBuild, FinishReason, GenerationRequest, SamplingParams
from tide_pipeline.engine.embedded import EmbeddedEngine
from tide_pipeline.engine_spec import EngineSpec
from tide_pipeline.errors import BuildError

PROMPT = "The "                        # any text: the figures only have to be there
TOKENS = 24


def warm_up(config: TideConfig, spec: EngineSpec, build: EngineBuild) -> dict[str, float]:
    """Load target and draft, generate a few tokens greedily; load_s, tokens_per_s and acceptance_length.

    Raises:
        CheckpointError, EngineMismatch, BuildError: the draft can't be loaded on this target, or the engine failed on it.
    """
    began = time.perf_counter()
    engine = EmbeddedEngine(config.engine_dir / spec.model, spec, dataclasses.replace(config.serve, max_batch=1), config.speculation)
    try:
        engine.set_drafts({ANY_WORKLOAD: build})
        load_s = time.perf_counter() - began
        engine.start()
        seconds, accepted, verify_steps = _generate(engine, str(min(config.gate.draft_length, spec.max_draft_length)))
    finally:
        engine.close()
    return {"load_s": round(load_s, 3), "tokens_per_s": round(TOKENS / seconds, 1),
            "acceptance_length": round(1.0 + accepted / max(verify_steps, 1), 3)}


def _generate(engine: EmbeddedEngine, speculation: str) -> tuple[float, int, int]:
    began = time.perf_counter()
    sampling = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    *_, last = engine.submit(GenerationRequest("warm-up", PROMPT, sampling, speculation))
    if last.finish_reason is not FinishReason.LENGTH:
        raise BuildError(f"the warm-up request ended with {last.finish_reason}: {last.error or 'no reason given'}")
    return time.perf_counter() - began, last.accepted_tokens, last.verify_steps
