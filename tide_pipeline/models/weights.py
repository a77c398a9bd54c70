"""The tensors of a Hugging Face folder: `model.safetensors`, or the shards that `model.safetensors.index.json` lists. Knows no network."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tide_pipeline.errors import CheckpointError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PLAIN = (torch.float32, torch.bfloat16, torch.float16)


def shard_names(folder: Path) -> tuple[str, ...]:
    """Files that hold the weights. One whole file comes before an index, as in transformers; it is named too where neither is there."""
    index = folder / INDEX
    if (folder / WHOLE).is_file() or not index.is_file():
        return (WHOLE,)
    try:
        names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} has no weight_map of tensors to files: fetch it again") from error
    strange = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if strange or not names:
        raise CheckpointError(f"{index} names {strange[0]!r} and not a safetensors file beside it" if strange else f"{index} lists nothing")
    return tuple(names)


def read_weights(folder: Path, only: Collection[str] | None = None, device: torch.device | None = None,
                 dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """All tensors, or those named in `only` as far as they are there; on the host and in fp32 if not asked otherwise.

    Raises:
        CheckpointError: a file is missing or cut short, a tensor is quantised, stored twice, or not finite.
    """
    weights: dict[str, Tensor] = {}
    for name in shard_names(folder):
        for tensor_name, tensor in _read_file(folder / name, only, device, dtype).items():
            if tensor_name in weights:
                raise CheckpointError(f"{folder}: two shards hold {tensor_name}; fetch the target again")
            weights[tensor_name] = tensor
    return weights


def _read_file(file: Path, only: Collection[str] | None, device: torch.device | None, dtype: torch.dtype) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as shard:
            return {name: _plain(file, name, shard.get_tensor(name), device, dtype) for name in shard.keys()  # noqa: SIM118 (no mapping)
                    if only is None or name in only}
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{file} is not a whole safetensors file ({error}); fetch it again") from error


def _plain(file: Path, name: str, tensor: Tensor, device: torch.device | None, dtype: torch.dtype) -> Tensor:
    if tensor.dtype not in PLAIN:
        raise CheckpointError(f"{file}: {name} is {str(tensor.dtype).removeprefix('torch.')}; the embedded engine serves weights in "
                              "fp32, bf16 and fp16, not quantised ones: fetch the unquantised checkpoint")
    plain = tensor.to(device, dtype, copy=True)          # a tensor as it is would go on pointing into the file
    if not torch.isfinite(plain).all():
        raise CheckpointError(f"{file}: {name} holds NaN or infinite values")
    return plain
