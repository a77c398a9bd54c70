"""Memory from numbers: to the byte where a published checkpoint says what it must be, by hand elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tide_pipeline import recipes
from tide_pipeline.engine.gpus import GPUS, gpu_named
from tide_pipeline.engine.memory import (
    OVERHEAD,
    draft_bytes,
    graph_batches,
    kv_bytes_per_token,
    serving_memory,
    step_tokens,
    tap_row_bytes,
    training_memory,
    weight_bytes,
)
from tide_pipeline.engine_spec import Architecture, EngineSpec, StartingDraft, load_engine_spec
from tide_pipeline.errors import SettingsError

ENGINES = Path(__file__).resolve().parents[2] / "engines"

# `total_size` in model.safetensors.index.json of each, as several public projects quote it.
PUBLISHED = {"llama-3.1-8b": 16_060_522_496, "llama-3.3-70b": 141_107_412_992, "qwen3-8b": 16_381_470_720, "gpt-oss-120b": 65_248_815_744}


def spec_of(engine: str) -> EngineSpec:
    return load_engine_spec(ENGINES / engine)


@pytest.mark.parametrize(("engine", "total"), PUBLISHED.items())
def test_weights_are_the_published_checkpoint_to_the_byte(engine: str, total: int) -> None:
    assert weight_bytes(spec_of(engine).architecture) == total


def test_tied_embeddings_are_held_once() -> None:
    a = spec_of("qwen3-8b").architecture
    assert weight_bytes(a) - weight_bytes(replace(a, tie_word_embeddings=True)) == 151_936 * 4_096 * 2


# File sizes of model.safetensors: nvidia/gpt-oss-120b-Eagle3-long-context, and a fine-tune of Tengyunw/qwen3_8b_eagle3.
@pytest.mark.parametrize(("engine", "file_size"), [("gpt-oss-120b", 430_964_464), ("qwen3-8b", 799_457_128)])
def test_drafts_are_the_published_files_but_for_the_header(engine: str, file_size: int) -> None:
    spec = spec_of(engine)
    header = file_size - draft_bytes(spec.architecture, spec.draft)
    assert 1_000 < header < 2_000


@pytest.mark.parametrize(("engine", "gpus", "wanted"), [
    ("llama-3.1-8b", 1, 2 * 8 * 128 * 2 * 33),      # keys and values x heads x head size x bf16 x layers, the draft's included
    ("llama-3.3-70b", 1, 2 * 8 * 128 * 2 * 81),
    ("llama-3.3-70b", 4, 2 * 2 * 128 * 2 * 81),
    ("llama-3.3-70b", 16, 2 * 1 * 128 * 2 * 81),    # a head is not split: it is there twice
    ("gpt-oss-120b", 1, 2 * 8 * 64 * 2 * 37)])
def test_a_cached_token(engine: str, gpus: int, wanted: int) -> None:
    a = spec_of(engine).architecture
    assert kv_bytes_per_token(a, gpus) == wanted
    assert kv_bytes_per_token(a, gpus, value_bytes=1) == wanted // 2


def test_tapped_states_of_a_token() -> None:
    assert tap_row_bytes(spec_of("llama-3.1-8b").architecture) == 24 * 1024              # facts: 24 KiB at H = 4096
    assert tap_row_bytes(spec_of("gpt-oss-120b").architecture) == 17_280                 # the paper's figure


@pytest.mark.parametrize(("largest", "wanted"), [(1, (1,)), (2, (1, 2)), (8, (1, 2, 4, 8)), (12, (1, 2, 4, 8, 12)),
                                                 (64, (1, 2, 4, 8, 16, 32, 64))])
def test_graphs_are_few_and_end_at_the_largest_batch(largest: int, wanted: tuple[int, ...]) -> None:
    assert graph_batches(largest) == wanted


def test_serving_qwen_on_an_h100_by_hand() -> None:
    config = recipes.on_gpus("qwen3-8b/h100", ENGINES)
    m = serving_memory(spec_of("qwen3-8b"), config.serve, GPUS["h100"])
    row, tokens = 24_576, 8_192
    assert step_tokens(config.serve, 3) == tokens
    assert (m.weights, m.draft) == (16_381_470_720, 799_455_616)
    assert m.tap_buffers == (1 + 7) * tokens * row and m.ring == 4 * tokens * row        # 1, 2, 4 .. 64: seven graphs
    assert m.activations == tokens * (6 * 4_096 + 3 * 12_288) * 2 + 64 * 4 * 151_936 * 4 * 2
    assert m.fixed == m.weights + m.draft + m.tap_buffers + m.ring + m.activations + OVERHEAD
    assert m.kv_token == 151_552 and m.kv_tokens == int((81_559 * 2**20 - m.fixed) * 0.85 // 151_552)
    assert m.needed_tokens == 64 * 2_048 and m.fits


def test_more_gpus_leave_more_room_and_too_few_leave_none() -> None:
    spec, serve = spec_of("llama-3.3-70b"), recipes.on_gpus("llama-3.3-70b/h100", ENGINES).serve
    rooms = [serving_memory(spec, replace(serve, gpus=n), GPUS["h100"]).kv_tokens for n in (1, 2, 4, 8)]
    assert rooms[0] == 0 and rooms == sorted(rooms) and rooms[2] > 0
    assert not serving_memory(spec, replace(serve, gpus=1), GPUS["h100"]).fits


def test_training_a_draft_by_hand() -> None:
    config = recipes.on_gpus("qwen3-8b/+a10", ENGINES)
    m = training_memory(spec_of("qwen3-8b"), config.training, GPUS["a10"])
    layer = 3 * 4_096**2 + 6_144 * 8_192 + 4_096**2 + 3 * 4_096 * 12_288 + 4 * 4_096
    assert m.trained == 8 * layer + 4 * 32_000 * 4_096                                   # weights and gradients in fp32; lm_head is frozen
    assert m.kept == 8 * layer                                                           # AdamW's moments
    assert m.frozen == 2 * 151_936 * 4_096 * 4
    assert m.activations == 3 * 1_024 * ((6 * 4_096 + 3 * 12_288 + 4 * 32 * 128 + 2 * 32_000) * 4 + 32 * 1_024 * 4)
    assert m.fits
    muon = training_memory(spec_of("qwen3-8b"), replace(config.training, optimizer="muon"), GPUS["a10"])
    assert m.kept - muon.kept == 4 * layer
    averaged = training_memory(spec_of("qwen3-8b"), replace(config.training, ema_decay=0.9), GPUS["a10"])
    assert averaged.kept - m.kept == 4 * layer


def test_processes_share_the_optimizer_state_by_whole_tensors() -> None:
    spec, settings = spec_of("llama-3.3-70b"), recipes.on_gpus("llama-3.3-70b/+l40s", ENGINES).training
    kept = [training_memory(spec, replace(settings, train_devices=("cuda:0",) * n), GPUS["l40s"]).kept for n in (1, 2, 8)]
    layer = 3 * 8_192**2 + 10_240 * 16_384 + 8_192**2 + 3 * 8_192 * 28_672
    assert kept[0] == 8 * (layer + 4 * 8_192)
    assert 0.5 * kept[0] <= kept[1] < 0.502 * kept[0]
    assert kept[2] == 8 * 8_192 * 28_672                                                 # one matrix of the MLP: it is not cut


def test_a_draft_without_an_lm_head_and_one_of_the_whole_vocabulary() -> None:
    a = Architecture(64, 12, 4, 2, 16, 96, 300)
    layer = 3 * 64 * 64 + (64 + 2 * 32) * 128 + 64 * 64 + 3 * 64 * 96 + 4 * 64
    assert draft_bytes(a, StartingDraft(has_lm_head=False)) == 2 * layer
    assert draft_bytes(a, StartingDraft()) == 2 * layer + 2 * 300 * 64 + 8 * 300 + 300
    assert draft_bytes(a, StartingDraft(vocab_size=100), num_taps=2) == 2 * (layer - 64 * 64) + 2 * 100 * 64 + 8 * 100 + 300


def test_gpu_classes_are_found_by_name() -> None:
    assert gpu_named("H100").memory == 81_559 * 2**20 and gpu_named("a100").has_bf16 and not gpu_named("v100").has_bf16
    assert gpu_named("l40s").has_fp8 and not gpu_named("a100").has_fp8
    with pytest.raises(SettingsError, match="did you mean 'h100'"):
        gpu_named("h1000")
    with pytest.raises(SettingsError, match="there are: h200, h100"):
        gpu_named("xyz")
