"""The random Llama of the GPU benchmark: its size is Llama 3.1 8B's, and it runs."""

from __future__ import annotations

from dataclasses import replace

import torch
from random_llama import bytes_read, llama_8b, random_target, tiny_llama

from tests.helpers import plain_pass, tiny_spec
from tide_pipeline.models.target import EMBEDDING, weight_shapes


def test_the_8b_shape_has_as_many_weights_as_llama_3_1_8b() -> None:
    sizes = {name: torch.Size(size).numel() for name, size in weight_shapes(llama_8b(1024)).items()}
    assert sum(sizes.values()) == 8_030_261_248
    assert sizes[EMBEDDING] == 128_256 * 4096


def test_a_random_target_runs_and_counts_what_a_step_reads() -> None:
    target = random_target(tiny_llama(64), replace(tiny_spec(), max_context=64), torch.device("cpu"))
    taps, final, logits = plain_pass(target, list(range(40)))
    assert all(bool(torch.isfinite(states).all()) for states in (taps, final, logits)) and float(logits.std()) > 0
    per_layer = 128 * (4 + 2 * 2) * 32 + 4 * 32 * 128 + 3 * 128 * 256 + 2 * 128
    assert bytes_read(target) == 4 * (4 * per_layer + 128 + 512 * 128)
