"""Where the networks compute: the device that the settings name, its dtype, and how index tensors get there. Knows no network.

Token ids, positions and all that follows from them are made on the host and sent along; states stay on the device. So a step waits for
the device only where it reads a result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tide_pipeline.errors import SettingsError


def device_of(name: str) -> torch.device:
    """"cpu", "cuda" or "cuda:<n>". Raises SettingsError for another one, and for one that is not there."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError(f'{name!r} is no device: set serve.device to "cpu", "cuda" or "cuda:<n>"') from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise SettingsError(f'the embedded engine does not serve on {name!r}: set serve.device to "cpu", "cuda" or "cuda:<n>"')
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index or 0
    if index >= seen:
        why = f"torch {torch.__version__} sees {seen} GPUs"
        raise SettingsError(f'serve.device is {name!r}, but {why}: set it to "cpu", or look at the driver, CUDA_VISIBLE_DEVICES and '
                            "whether torch was built for CUDA")
    return torch.device("cuda", index)


def dtype_on(device: torch.device) -> torch.dtype:
    """Of weights, states and caches: 16 bits where the hardware multiplies them faster."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def pinned(host: Tensor, device: torch.device) -> Tensor:
    """As the source of a copy to `device` that nobody waits for."""
    return host.pin_memory() if device.type == "cuda" else host


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """In stream order, without waiting."""
    return host if device.type == "cpu" else pinned(host, device).to(device, non_blocking=True)
