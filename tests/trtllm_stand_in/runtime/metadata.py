"""What the spec metadata of the stand-in does: its buffer, and the count that prepare() leaves behind. By hand, apart from the facts."""

from __future__ import annotations

from typing import Any

import torch


def post_init(metadata: Any) -> None:
    """The buffer, and the layers: by default an early one, a middle one and a late one."""
    layers = metadata.layers_to_capture
    if layers is None:
        if metadata.num_layers <= 5:
            raise ValueError("Not enough hidden layers for default EAGLE3 capture")
        layers = (1, metadata.num_layers // 2 - 1, metadata.num_layers - 4)
    metadata.layers_to_capture = sorted(layers)
    metadata.hidden_states = torch.zeros(metadata.max_num_tokens, metadata.hidden_size * len(metadata.layers_to_capture),
                                         dtype=torch.bfloat16)


def prepare(metadata: Any) -> None:
    """`num_tokens` becomes the count that the draft needs: no longer the rows of the pass."""
    assert metadata.request_ids is not None
    metadata.num_tokens -= metadata.num_generations * getattr(metadata, "runtime_draft_len", metadata.max_draft_len)


def check_eagle(config: Any, schedule_means: str) -> None:
    """What NVIDIA's validators refuse in the configuration of a draft."""
    longest, schedule = config.max_draft_len, config.draft_len_schedule
    if not longest or draft_of(config) is None:
        raise ValueError("max_draft_len must be > 0 for Eagle, and a draft model must be provided")
    if schedule is None:
        return
    if schedule_means == "from" and schedule.get(1) != longest:
        raise ValueError(f"draft_len_schedule[1] must equal max_draft_len for consistency, got {schedule}")
    if schedule_means == "up to" and schedule[min(schedule)] != longest:
        raise ValueError(f"draft_len_schedule[{min(schedule)}] must equal max_draft_len because it is the smallest batch-size key")
    if schedule_means == "up to" and config.max_concurrency is not None:
        raise ValueError("max_concurrency and draft_len_schedule are mutually exclusive")
    if any(key < 1 or not 0 <= value <= longest for key, value in schedule.items()):
        raise ValueError(f"draft_len_schedule: all draft lengths must be within 0 .. max_draft_len, got {schedule}")


def draft_of(config: Any) -> Any:
    """The folder of the draft, by either name."""
    return config.speculative_model if hasattr(config, "speculative_model") else config.speculative_model_dir


def draft_len_for_batch_size(schedule: dict[int, int], batch_size: int) -> int:
    """A key speaks for batches up to its size; above the last one nothing is drafted."""
    return next((schedule[key] for key in sorted(schedule) if batch_size <= key), 0)
