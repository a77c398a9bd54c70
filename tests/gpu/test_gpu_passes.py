"""The networks on a GPU, in bf16: against `transformers`, and graphs against the passes that they were captured from.

NOT YET RUN ON A GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers import agreeing_draft, tiny_spec, write_tiny_target
from tide_pipeline.models.eagle3 import DraftRunner
from tide_pipeline.models.static import StaticPasses
from tide_pipeline.models.target import Target

pytestmark = pytest.mark.gpu
POSITIONS, SLOTS, WIDEST = 640, 5, 5
SAME = {"rtol": 2**-6, "atol": 2**-6}                              # a few steps of bf16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_target(tmp_path_factory.mktemp("gpu") / "target", hidden=64, head_dim=32, intermediate=128, context=1.0,
                             max_positions=POSITIONS)


@pytest.fixture(scope="module")
def target(folder: Path, device: torch.device) -> Target:
    return Target(folder, tiny_spec(max_context=POSITIONS, max_draft_length=WIDEST - 1), device, torch.bfloat16)


def off(got: Tensor, want: Tensor) -> float:
    return float((got.float().cpu() - want.float().cpu()).norm() / want.float().norm().cpu())


def test_the_target_is_as_near_to_fp32_as_transformers_in_bf16_is(folder: Path, target: Target, device: torch.device) -> None:
    from transformers import LlamaForCausalLM

    ids = torch.randint(1, target.shape.vocab_size, (2, 48), generator=torch.Generator().manual_seed(1))
    exact = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().to(device)
    with torch.no_grad():
        want, rounded = exact(ids, output_hidden_states=True), theirs(ids.to(device), output_hidden_states=True)
    taps, final = target.forward(ids, torch.arange(48).expand(2, -1), target.new_cache(2, 48))
    assert taps.device.type == device.type and taps.dtype == torch.bfloat16
    taps_of = [torch.cat([out.hidden_states[layer + 1] for layer in target.spec.capture_layers], dim=-1) for out in (rounded, want)]
    logits = target.logits(final.flatten(0, 1)).view(2, 48, -1)
    for ours, their, true in ((taps, *taps_of), (final, rounded.hidden_states[-1], want.hidden_states[-1]),
                              (logits, rounded.logits, want.logits)):
        assert off(ours, true) < max(2**-6, 1.5 * off(their, true))


def step(number: int) -> tuple[Tensor, Tensor, list[int]]:
    """Widths that differ, at contexts of two buckets."""
    generator = torch.Generator().manual_seed(number)
    widths = torch.randint(1, 1 + (WIDEST if number % 2 else 1), (1 + number % SLOTS,), generator=generator).tolist()
    positions = torch.tensor([(40 if number < 20 else 300) + 3 * slot + j for slot, width in enumerate(widths) for j in range(width)])
    return torch.randint(1, 200, (sum(widths),), generator=generator), positions, widths


def test_graphs_of_the_target_give_what_its_passes_give(target: Target) -> None:
    """Captured, replayed, eager with padding, and ordinary."""
    graphs, eager, plain = (target.new_cache(SLOTS, POSITIONS) for _ in range(3))
    assert graphs.static is not None
    eager.static, plain.static = StaticPasses(target._pass, WIDEST), None
    for number in [*range(40), *range(40)]:                        # every bucket comes up again, as a replay
        ids, positions, widths = step(number)
        results = [target.forward_rows(ids, positions, widths, cache) for cache in (graphs, eager, plain)]
        for name, captured, padded, ordinary in zip(("taps", "final"), *results, strict=True):
            torch.testing.assert_close(captured, padded, **SAME, msg=lambda text, n=number, name=name: f"{name}, step {n}: {text}")
            assert off(captured, ordinary) < 2**-6, f"{name}, step {number}"
    assert len(graphs.static.buckets) > 5
    assert off(graphs.rows[:, : graphs.scratch], plain.rows[:, : plain.scratch]) < 2**-6


def test_graphs_of_the_draft_give_what_its_passes_give(target: Target, folder: Path) -> None:
    runner = DraftRunner(agreeing_draft(Target(folder, target.spec)), target.embedding_VD)
    graphs, plain = runner.new_cache(SLOTS, POSITIONS), runner.new_cache(SLOTS, POSITIONS)
    plain.static = None
    for number in [*range(12), *range(12)]:
        ids, positions, widths = step(number)
        taps = torch.randn(len(ids), 3 * target.shape.hidden_size, generator=torch.Generator().manual_seed(number))
        taps = taps.to(target.device, target.dtype)
        assert off(*(runner.extend(taps, ids, positions, widths, cache) for cache in (graphs, plain))) < 2**-6
        state, B = taps[: len(widths), : target.shape.hidden_size], len(widths)
        assert off(*(runner.step(state, ids[:B], torch.full((B,), 320), cache) for cache in (graphs, plain))) < 2**-6
    assert graphs.static is not None and graphs.static.buckets


def test_dropped_buckets_give_their_memory_to_the_next(target: Target, device: torch.device) -> None:
    cache = target.new_cache(SLOTS, POSITIONS)
    assert cache.static is not None
    cache.static._limit, used = 3, []
    for number in [*range(40)] * 3:
        ids, positions, widths = step(number)
        target.forward_rows(ids, positions, widths, cache)
        used.append(torch.cuda.memory_reserved(device))
    assert used[-1] <= 1.2 * used[39] + 2**22
