"""A Llama of any size with random weights, made where it will run: nothing is read from disk. Knows no timing."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tide_pipeline.engine_spec import EngineSpec
from tide_pipeline.models.device import dtype_on
from tide_pipeline.models.families import TargetShape
from tide_pipeline.models.layers import Heads
from tide_pipeline.models.rope import Llama3Rope, Rope
from tide_pipeline.models.target import EMBEDDING, Target, weight_shapes

SPREAD = 0.02                     # of the weights, as models are initialised: states stay finite through all layers


def llama_8b(max_positions: int) -> TargetShape:
    """The shape of Llama 3.1 8B: 16.1 GB in bf16."""
    return TargetShape(hidden_size=4096, layers=32, heads=Heads(32, 8, 128), intermediate_size=14_336, vocab_size=128_256,
                       max_positions=max_positions, rope=Llama3Rope(500_000.0, 8.0, 1.0, 4.0, 8192), eps=1e-5, eos_ids=(), tied=False,
                       biased=(), qk_norm=False, window=None)


def tiny_llama(max_positions: int) -> TargetShape:
    """Shows on any machine that a script runs."""
    return TargetShape(hidden_size=128, layers=4, heads=Heads(4, 2, 32), intermediate_size=256, vocab_size=512,
                       max_positions=max_positions, rope=Rope(10_000.0), eps=1e-5, eos_ids=(), tied=False, biased=(), qk_norm=False,
                       window=None)


def random_target(shape: TargetShape, spec: EngineSpec, device: torch.device, seed: int = 0) -> Target:
    generator, dtype = torch.Generator(device).manual_seed(seed), dtype_on(device)
    weights = {name: torch.ones(size, device=device, dtype=dtype) if len(size) == 1 else
               torch.empty(size, device=device, dtype=dtype).normal_(std=SPREAD, generator=generator)
               for name, size in weight_shapes(shape).items()}
    return Target.of(shape, spec, "random weights", weights)


def bytes_read(target: Target) -> int:
    """By a step of any width: every weight once, the embeddings excepted, of which a row is looked up."""
    numbers = sum(torch.Size(size).numel() for name, size in weight_shapes(target.shape).items() if name != EMBEDDING)
    return numbers * target.dtype.itemsize


def write_byte_tokenizer(folder: Path) -> None:
    """One token a byte: a random model has no better use for its vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
