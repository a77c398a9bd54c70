"""Requests in TensorRT-LLM's terms, and what its answers say of drafting. Knows field names; starts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tide_pipeline.contracts import FinishReason, GenerationRequest

REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "timeout": FinishReason.DEADLINE, "cancelled": FinishReason.CANCELLED}


def sampling_arguments(request: GenerationRequest, eos_ids: Sequence[int]) -> dict[str, Any]:
    """Of SamplingParams. With neither top_k nor top_p it decodes greedily, whatever the temperature: top_p is named even when it is off.

    Stop strings and text are ours (engine/text.py).
    """
    how = request.sampling
    chosen: dict[str, Any] = {"max_tokens": how.max_tokens, "ignore_eos": how.ignore_eos, "detokenize": False, "return_perf_metrics": True}
    if eos_ids:
        chosen["end_id"] = eos_ids[0]
        if not how.ignore_eos and len(eos_ids) > 1:
            chosen["stop_token_ids"] = list(eos_ids[1:])
    if how.temperature > 0:
        chosen |= {"temperature": how.temperature, "top_p": how.top_p, "seed": how.seed}
        chosen |= {"top_k": how.top_k} if how.top_k else {}
    return chosen


@dataclass(frozen=True, slots=True)
class Totals:
    """Of one finished request; steps are those after its prompt."""

    target_steps: int
    verify_steps: int
    drafted: int
    accepted: int


def totals(output: Any, num_output: int, draft_length: int, counted: Totals) -> Totals:
    """The server's own count where it gives one, public before private; else `counted`, from the differences of its responses.

    `request_perf_metrics` is all zeros in versions that do not fill it; `avg_decoded_tokens_per_iter` counts the prompt's step too.
    """
    per_step = getattr(output, "avg_decoded_tokens_per_iter", None)
    if not per_step or num_output < 1:
        return counted
    steps = max(0, round(num_output / per_step) - 1)
    accepted = max(0, num_output - 1 - steps)
    verified = steps if draft_length else 0
    metrics = getattr(getattr(output.outputs[0], "request_perf_metrics", None), "speculative_decoding", None)
    drafted = getattr(metrics, "total_draft_tokens", 0) or max(counted.drafted, accepted)
    return Totals(steps, verified, drafted, accepted if verified else 0)
