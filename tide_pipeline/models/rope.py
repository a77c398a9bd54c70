"""Rotary positions: how fast each pair of a head's dimensions turns, plain or stretched for long contexts. Knows no network.

Each class is one `rope_type` of Hugging Face's config.json. `dynamic` changes the plain frequencies only past max_position_embeddings,
where the engine never goes: it is served as the plain one. E = size of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tide_pipeline.errors import CheckpointError

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class Rope:
    """Plain: pair i turns by theta^(-2i/E) a position."""

    theta: float

    @property
    def scale(self) -> float:
        """Of cos and sin."""
        return 1.0

    def frequencies(self, size: int) -> Tensor:
        """Radians a position of each pair: [E / 2]."""
        return 1.0 / self.theta ** (torch.arange(0, size, 2).float() / size)


@dataclass(frozen=True)
class LinearRope(Rope):
    """Positions count for `factor` times less."""

    factor: float

    def frequencies(self, size: int) -> Tensor:
        return super().frequencies(size) / self.factor


@dataclass(frozen=True)
class Llama3Rope(Rope):
    """Llama 3.1: pairs that turn less than `slow` times in the original context are stretched, those above `fast` are not."""

    factor: float
    slow: float
    fast: float
    original_positions: float

    def frequencies(self, size: int) -> Tensor:
        plain = super().frequencies(size)
        turns = self.original_positions * plain / (2 * math.pi)
        kept = ((turns - self.slow) / (self.fast - self.slow)).clamp(0, 1)
        return plain * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True)
class YarnRope(Rope):
    """YaRN (arXiv 2309.00071): a ramp over the dimensions between those two, and sharper attention."""

    factor: float
    slow: float
    fast: float
    original_positions: float
    attention_factor: float
    whole_dimensions: bool         # the ramp begins and ends on a whole dimension

    @property
    def scale(self) -> float:
        return self.attention_factor

    def frequencies(self, size: int) -> Tensor:
        plain = super().frequencies(size)
        first, last = self._dimension(self.fast, size), self._dimension(self.slow, size)
        if self.whole_dimensions:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, size - 1)
        kept = 1 - ((torch.arange(size // 2) - first) / ((last - first) or 1e-3)).clamp(0, 1)
        return plain * (kept + (1 - kept) / self.factor)

    def _dimension(self, turns: float, size: int) -> float:
        """The pair, as a fraction, that turns this often in the original context."""
        return size * math.log(self.original_positions / (turns * 2 * math.pi)) / (2 * math.log(self.theta))


def rotary_tables(rope: Rope, size: int, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sign-folded sin, [positions, E]: rotate(x) = x * cos + roll(x, E / 2) * sin."""
    angles = torch.outer(torch.arange(positions).float(), rope.frequencies(size))
    sin = angles.sin() * rope.scale
    return (angles.cos() * rope.scale).repeat(1, 2), torch.cat((-sin, sin), dim=1)


def read_rope(raw: Mapping[str, Any], where: str) -> Rope:
    """From config.json: `rope_scaling` beside `rope_theta`, or transformers 5's `rope_parameters`. Raises CheckpointError."""
    given: dict[str, Any] = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in KINDS or any(isinstance(value, dict) for value in given.values()):
        what = f"rope type {kind!r}" if kind not in KINDS else "a rope type for each kind of layer"
        raise CheckpointError(f"{where}: {what} is not supported by the embedded engine; it serves {', '.join(KINDS)}")
    partial = given.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise CheckpointError(f"{where}: partial_rotary_factor {partial} is not supported by the embedded engine; it turns whole heads")

    def number(name: str, default: float | None = None) -> float:
        value = given.get(name) if given.get(name) is not None else default
        if not isinstance(value, int | float) or value <= 0:
            raise CheckpointError(f"{where}: rope type {kind!r} needs {name} above 0, got {value}: fetch the target again")
        return float(value)

    theta = number("rope_theta", raw.get("rope_theta") or 10000.0)
    if kind in ("default", "dynamic"):
        return Rope(theta)
    if kind == "linear":
        return LinearRope(theta, number("factor"))
    positions = raw["max_position_embeddings"]
    original = raw.get("original_max_position_embeddings") or number("original_max_position_embeddings", positions)
    if kind == "llama3":
        return Llama3Rope(theta, number("factor"), number("low_freq_factor"), number("high_freq_factor"), original)
    factor = number("factor", positions / original)
    return YarnRope(theta, factor, number("beta_slow", 1.0), number("beta_fast", 32.0), original,
                    number("attention_factor", _sharper(factor, given)), bool(given.get("truncate", True)))


def _sharper(factor: float, given: Mapping[str, Any]) -> float:
    """YaRN's factor of cos and sin where config.json has none."""
    def grown(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    over, under = given.get("mscale"), given.get("mscale_all_dim")
    return grown(over) / grown(under) if over and under else grown(1.0)
