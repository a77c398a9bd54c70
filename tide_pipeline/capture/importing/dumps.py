"""Read what TensorRT-LLM, Model-Optimizer and vLLM dump, one sequence at a time. Knows their layouts; knows no engine and no lake.

T = tokens of a sequence, D = hidden size, L = dumped layers. Row t of a state belongs to token t in all of them.

    trtllm     <prefix>_<n>.pt           list of {id, input_ids [T], hidden_state [T, D], aux_hidden_states [T, L·D]}
    modelopt   <conversation>.pt         {input_ids [T], hidden_states [T, D], aux_hidden_states [T, L·D], loss_mask [T], conversation_id}
    vllm       <request>.safetensors     {token_ids [T], hidden_states [T, L, D]}
Nothing is unpickled but tensors, numbers, texts, lists and dicts: torch.load(weights_only=True) refuses the rest, and so do we.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tide_pipeline.errors import LakeError

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
INTEGERS = (torch.int64, torch.int32)
SAFE_TORCH = (2, 10)               # the first whose weights_only unpickler has no known way round it
MASKS = (*INTEGERS, torch.bool, torch.uint8, torch.int8)


class Refused(LakeError):
    """A file or a sequence that can't be imported, and why; the same words for the same cause, so that they can be counted."""


@dataclass(frozen=True)
class Dump:
    """One sequence as it was dumped. States are read as wide as they are: fit.py holds them against the engine."""

    token_ids_T: Tensor
    aux_TX: Tensor                 # the dumped layers side by side, X = L · D
    last_TD: Tensor | None         # what the dump calls its last state, by itself
    mask_T: Tensor | None = None   # 1 where a token was generated


@dataclass(frozen=True)
class DumpFormat:
    """A layout: which files, how they are read, and what is known of their last state."""

    pattern: str
    read: Callable[[Path], Iterator[Dump | Refused]]   # raises Refused for the whole file, gives it for one sequence
    last_is_a_layer: bool = False  # the state after the last layer is the last of the dumped layers, where it was asked for


def read_trtllm(file: Path) -> Iterator[Dump | Refused]:
    """SaveHiddenStates: a list of requests. A bad one does not cost those after it."""
    found = _unpickled(file)
    if not isinstance(found, list):
        raise Refused(f"holds a {type(found).__name__} where SaveHiddenStates writes a list: is it of --format modelopt?")
    for item in found:
        try:
            values = _mapping(item, {"input_ids", "hidden_state"}, {"id", "aux_hidden_states", "hidden_state_features"})
            aux = values.get("aux_hidden_states", values.get("hidden_state_features"))
            yield _dump(values["input_ids"], aux, values["hidden_state"])
        except Refused as refused:
            yield refused


def read_modelopt(file: Path) -> Iterator[Dump | Refused]:
    """compute_hidden_states_{hf,trtllm,vllm}.py: one conversation."""
    found = _unpickled(file)
    if isinstance(found, list):
        raise Refused("holds a list where Model-Optimizer writes one conversation: is it of --format trtllm?")
    values = _mapping(found, {"input_ids", "hidden_states"}, {"aux_hidden_states", "loss_mask", "conversation_id"})
    yield _dump(values["input_ids"], values.get("aux_hidden_states"), values["hidden_states"], values.get("loss_mask"))


def read_vllm(file: Path) -> Iterator[Dump | Refused]:
    """ExampleHiddenStatesConnector: one request, layers in the order of eagle_aux_hidden_state_layer_ids."""
    try:
        with safe_open(file, framework="pt") as opened:
            values = _mapping({name: opened.get_tensor(name) for name in opened.keys()}, {"token_ids", "hidden_states"}, set())  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise Refused("is not a whole safetensors file") from error
    states = _tensor(values, "hidden_states", FLOATS, 3)
    yield _dump(values["token_ids"], states.flatten(1), None)


FORMATS = {
    "trtllm": DumpFormat("*.pt", read_trtllm),
    "modelopt": DumpFormat("*.pt", read_modelopt),
    "vllm": DumpFormat("*.safetensors", read_vllm, last_is_a_layer=True),
}


def _unpickled(file: Path) -> Any:
    """Tensors in plain containers, mapped and not copied; what else a pickle may hold is refused before it runs."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < SAFE_TORCH:
        raise LakeError(f"torch {torch.__version__} may run code from a .pt file even with weights_only (CVE-2025-32434, CVE-2026-24747): "
                        f"import with torch {'.'.join(map(str, SAFE_TORCH))} or later")
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise Refused("holds more than tensors, numbers and texts, and loading it would run code: it is not read") from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused("is not a whole file of torch.save's zip format") from error


def _mapping(found: Any, needed: set[str], possible: set[str]) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise Refused(f"holds a {type(found).__name__} where a dict is expected")
    names = {str(name) for name in found}
    if missing := sorted(needed - names):
        raise Refused(f"lacks {', '.join(missing)}")
    if unknown := sorted(names - needed - possible):
        raise Refused(f"has {', '.join(unknown)[:80]}, which this format did not have when the importer was written")
    return found


def _dump(token_ids: Any, aux: Any, last: Any, mask: Any = None) -> Dump:
    values = {"token ids": token_ids, "aux_hidden_states": aux, "the last state": last, "loss_mask": mask}
    if aux is None or (isinstance(aux, Tensor) and aux.numel() == 0):
        raise Refused("has no states of inner layers: dump the layers that engine.toml captures")
    dump = Dump(_tensor(values, "token ids", INTEGERS, 1), _tensor(values, "aux_hidden_states", FLOATS, 2),
                None if last is None else _tensor(values, "the last state", FLOATS, 2),
                None if mask is None else _tensor(values, "loss_mask", MASKS, 1))
    lengths = {len(tensor) for tensor in (dump.token_ids_T, dump.aux_TX, dump.last_TD, dump.mask_T) if tensor is not None}
    if len(lengths) > 1:
        raise Refused("tokens, states and mask differ in length: a cached prefix was left out of the dump, or it was cut short")
    return dump


def _tensor(values: dict[str, Any], name: str, dtypes: tuple[torch.dtype, ...], dims: int) -> Tensor:
    """A plain tensor in memory, or Refused: a pickle may hold sparse, quantised, or meta ones too."""
    value = values[name]
    if type(value) is not Tensor or value.layout is not torch.strided or value.device.type != "cpu":
        raise Refused(f"{name} is no plain tensor")
    if value.dtype not in dtypes:
        raise Refused(f"{name} is {str(value.dtype).removeprefix('torch.')}, expected "
                      f"{', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}")
    if value.dim() != dims:
        raise Refused(f"{name} has {value.dim()} dimensions, expected {dims}")
    return value
