"""The stand-in's target and draft: states and tokens are a known function of the prefix, so a test can say what must be captured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

PRIME = (1 << 61) - 1
SPREAD = 1_000_003


def prefix_hash(tokens: Sequence[int]) -> int:
    value = 7
    for token in tokens:
        value = (value * SPREAD + token + 1) % PRIME
    return value


@dataclass(frozen=True, slots=True)
class Network:
    """Numbers of a target; no weights."""

    vocab_size: int = 64
    hidden_size: int = 16
    num_layers: int = 8
    eos_id: int | None = None

    @classmethod
    def of(cls, folder: str) -> Network:
        """Sizes from a checkpoint's config.json, where the model is a folder."""
        file = Path(folder) / "config.json"
        if not file.is_file():
            return cls()
        raw = json.loads(file.read_text())
        eos = raw.get("eos_token_id")
        return cls(raw.get("vocab_size", 64), raw.get("hidden_size", 16), raw.get("num_hidden_layers", 8),
                   eos[0] if isinstance(eos, list) else eos)

    def states(self, tokens: Sequence[int], start: int, num_layers: int) -> Tensor:
        """[len(tokens) - start, num_layers * hidden_size] of the positions from `start` on: multiples of 1/128, exact in bf16."""
        hashes = torch.tensor([prefix_hash(tokens[: i + 1]) % (1 << 31) for i in range(start, len(tokens))], dtype=torch.int64)
        columns = torch.arange(num_layers * self.hidden_size, dtype=torch.int64)
        mixed = hashes[:, None] * (2 * columns + 1) + columns * columns * 31
        return ((mixed // 64 % 256 - 128).to(torch.float32) / 128).to(torch.bfloat16)

    def next_token(self, tokens: Sequence[int]) -> int:
        return prefix_hash([*tokens, 1]) % self.vocab_size

    def draft(self, tokens: Sequence[int], count: int) -> list[int]:
        """Right about two times in three, by the prefix alone."""
        drafted: list[int] = []
        for _ in range(count):
            so_far = [*tokens, *drafted]
            right = self.next_token(so_far)
            drafted.append(right if prefix_hash([*so_far, 2]) % 3 else (right + 1) % self.vocab_size)
        return drafted
