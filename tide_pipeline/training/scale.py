"""Taps brought to about unit size while training. Knows windows and the draft's first matrix.

A target's deep states are large and uneven: in the pocket target 13 to 27 on average and up to 440, channel by channel. Fed
as they are, fc's output drowns what the draft's one layer adds, and learning takes twice the steps. So each
channel is divided by a power of two near its size, and fc's columns are multiplied by it: exact both ways in bf16.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tide_pipeline.capture.reader import WindowStates
from tide_pipeline.models.eagle3 import Eagle3Draft


def channel_scale(squares_G: Tensor) -> Tensor:
    """[G]: the power of two nearest to each channel's root mean square; 1 for dead channels and for those that are not finite."""
    squares = squares_G.float()
    rms_G = torch.where(squares > 1e-8, squares, torch.ones_like(squares)).sqrt()
    return torch.exp2(rms_G.log2().round().clamp(-8, 12))


def scaled(states: WindowStates, scale_G: Tensor) -> WindowStates:
    """The same window with its taps divided by the scale."""
    return dataclasses.replace(states, taps_TG=states.taps_TG / scale_G.bfloat16())


@torch.no_grad()
def for_scaled_taps(draft: Eagle3Draft, scale_G: Tensor) -> None:
    """Make a draft that read raw taps compute the same from scaled ones."""
    draft.fc.weight.mul_(scale_G.to(draft.fc.weight.device))


@torch.no_grad()
def for_raw_taps(draft: Eagle3Draft, scale_G: Tensor) -> None:
    """Undo `for_scaled_taps`."""
    draft.fc.weight.div_(scale_G.to(draft.fc.weight.device))
