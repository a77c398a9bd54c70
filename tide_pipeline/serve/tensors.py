"""The model's inputs and outputs, named and typed as in TensorRT-LLM's own Triton model (llmapi); ours come after. Knows no Triton.

Seen in NVIDIA/TensorRT-LLM, triton_backend/all_models/llmapi/tensorrt_llm/: `stop` is a flag that cancels a running request, stop
strings are `sampling_param_stop`. Outputs that NVIDIA declares as numbers arrive as strings there; here they are declared so.
"""

from __future__ import annotations

from dataclasses import dataclass

MANY = -1


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of config.pbtxt."""

    name: str
    data_type: str
    dims: int = 1
    optional: bool = True


INPUTS = (
    TensorSpec("text_input", "TYPE_STRING", MANY, optional=False),
    TensorSpec("streaming", "TYPE_BOOL"),
    TensorSpec("sampling_param_max_tokens", "TYPE_INT32"),
    TensorSpec("sampling_param_temperature", "TYPE_FP32"),
    TensorSpec("sampling_param_top_k", "TYPE_INT32"),
    TensorSpec("sampling_param_top_p", "TYPE_FP32"),
    TensorSpec("sampling_param_stop", "TYPE_STRING", MANY),
    TensorSpec("sampling_param_seed", "TYPE_UINT64"),
    TensorSpec("sampling_param_exclude_input_from_output", "TYPE_BOOL"),
    TensorSpec("sampling_param_ignore_eos", "TYPE_BOOL"),
    TensorSpec("sampling_param_return_perf_metrics", "TYPE_BOOL"),
    TensorSpec("return_finish_reason", "TYPE_BOOL"),
    TensorSpec("stop", "TYPE_BOOL"),
    # ours
    TensorSpec("speculation", "TYPE_STRING"),
    TensorSpec("workload", "TYPE_STRING"),
    TensorSpec("tenant", "TYPE_STRING"),
    TensorSpec("request_id", "TYPE_STRING"),
    TensorSpec("deadline_s", "TYPE_FP32"),
)

OUTPUTS = (
    TensorSpec("text_output", "TYPE_STRING", MANY),
    TensorSpec("finish_reason", "TYPE_STRING", MANY),
    TensorSpec("acceptance_rate", "TYPE_STRING"),
    TensorSpec("total_accepted_draft_tokens", "TYPE_STRING"),
    TensorSpec("total_draft_tokens", "TYPE_STRING"),
    # ours
    TensorSpec("draft_version", "TYPE_STRING"),
    TensorSpec("verify_steps", "TYPE_STRING"),
    TensorSpec("target_steps", "TYPE_STRING"),
    TensorSpec("num_output_tokens", "TYPE_STRING"),
    TensorSpec("num_prompt_tokens", "TYPE_STRING"),
)
