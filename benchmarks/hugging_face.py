"""Hugging Face `generate` on the same target, as a peer to compare with. Knows transformers; nothing of our engine.

Its best honest form: one thread, KV cache on, inference mode, `sdpa` attention, end of text switched off as in our requests. In
fp32, the arithmetic that our engine's sums have, and in the checkpoint's own bf16, which is what `from_pretrained` takes by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


class Generator:
    """Greedy continuation of token ids, to exactly the number of tokens asked for."""

    def __init__(self, model_dir: Path, dtype: torch.dtype, assistant_dir: Path | None = None, lookup_tokens: int = 0) -> None:
        self.model = _load(model_dir, dtype)
        self.extra: dict[str, Any] = {}
        if assistant_dir is not None:
            self.extra["assistant_model"] = _load(assistant_dir, dtype)
        if lookup_tokens:
            self.extra["prompt_lookup_num_tokens"] = lookup_tokens

    @torch.inference_mode()
    def __call__(self, prompt: Sequence[int], tokens: int) -> list[int]:
        ids = torch.tensor([list(prompt)])
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, **self.extra)
        answer: list[int] = out[0, len(prompt):].tolist()
        if len(answer) != tokens:
            raise RuntimeError(f"generate stopped after {len(answer)} of {tokens} tokens: blocks of unequal work can't be compared")
        return answer


def _load(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model
