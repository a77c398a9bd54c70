"""Where the rows of a step stand in the KV cache. Index arithmetic on the host, then what attention needs on the device.

B = requests in the step, W = token rows of a request, N = rows of all of them, T = cached positions, G = query heads of a key/value head.
Rows of a slot are neighbours. Products run over the N rows alone; attention wants a rectangle, so where slots have different numbers of
rows, its queries are padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tide_pipeline.models.device import to_device


@dataclass(frozen=True)
class StepRows:
    """Index tensors of one step. `build` makes them on the host, where reading a value costs nothing."""

    first_slot: int
    B: int
    W: int                       # rows of the slot that has most
    T: int                       # cached positions any row may look at
    masked: bool                 # False: every row sees all T positions
    positions: Tensor            # [N]
    cache_rows: Tensor           # [N] rows of the KV cache to write
    pad: Tensor | None           # [B * W] row that stands at each place of the rectangle; None when N == B * W
    unpad: Tensor | None         # [N] place of each row

    @staticmethod
    def build(positions_N: Tensor, widths: Sequence[int], first_slot: int, slot_positions: int) -> StepRows:
        """`widths`: rows of each slot, 0 for some; `slot_positions`: its length. A row may look at every cached position up to its own."""
        B, W, N = len(widths), max(widths), len(positions_N)
        slots_N, pad, unpad = torch.arange(first_slot, first_slot + B), None, None
        if B != N or W > 1:
            widths_B = torch.tensor(widths)
            slots_N = slots_N.repeat_interleave(widths_B, output_size=N)
            pad, unpad = rectangle(widths_B, W) if B * W > N else (None, None)
        cache_rows_N = slots_N * slot_positions + positions_N
        return StepRows(first_slot, B, W, int(positions_N.max()) + 1, N > 1, positions_N, cache_rows_N, pad, unpad)

    def to(self, device: torch.device) -> StepRows:
        if device.type == "cpu":
            return self
        pad, unpad = (None if index is None else to_device(index, device) for index in (self.pad, self.unpad))
        return StepRows(self.first_slot, self.B, self.W, self.T, self.masked, to_device(self.positions, device),
                        to_device(self.cache_rows, device), pad, unpad)


def rectangle(widths_B: Tensor, W: int) -> tuple[Tensor, Tensor]:
    """The row at each place of [B * W] (a slot's last one, where it has no more), and the place of each row [N]."""
    ends_B1 = widths_B.cumsum(0).unsqueeze(1)
    places_BW = torch.arange(W).expand(len(widths_B), W)
    pad = torch.minimum(ends_B1 - widths_B.unsqueeze(1) + places_BW, ends_B1 - 1).flatten()
    return pad, (places_BW < widths_B.unsqueeze(1)).flatten().nonzero().squeeze(1)


@dataclass(frozen=True)
class StepGeometry:
    """What every layer needs of a step's rows, on the device: made once per step, without reading a value back."""

    first_slot: int
    B: int
    W: int
    T: int
    cos: Tensor                  # [N, 1, E]
    sin: Tensor
    cache_rows: Tensor           # [N]
    mask: Tensor | None          # [B, 1, G * W, T] additive; None when every row sees all T positions
    pad: Tensor | None
    unpad: Tensor | None

    @staticmethod
    def of(rows: StepRows, groups: int, cos: Tensor, sin: Tensor) -> StepGeometry:
        """`cos` and `sin` by position, in the dtype of the network; `groups` is G."""
        mask = None
        if rows.masked:
            positions_BW = (rows.positions if rows.pad is None else rows.positions[rows.pad]).view(rows.B, rows.W)
            hidden = torch.arange(rows.T, device=cos.device) > positions_BW.unsqueeze(-1)          # [B, W, T]
            mask = torch.zeros(rows.B, 1, rows.W, rows.T, device=cos.device, dtype=cos.dtype)
            mask = mask.masked_fill_(hidden.unsqueeze(1), float("-inf")).repeat(1, 1, groups, 1)
        return StepGeometry(rows.first_slot, rows.B, rows.W, rows.T, cos[rows.positions].unsqueeze(1), sin[rows.positions].unsqueeze(1),
                            rows.cache_rows, mask, rows.pad, rows.unpad)
