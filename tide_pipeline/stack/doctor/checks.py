"""All checks of `tide doctor`, and how they are run. A check is a function of `Asked` that yields findings; a new one goes into CHECKS."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tide_pipeline.config import TideConfig
from tide_pipeline.errors import TideError
from tide_pipeline.stack.doctor import gpu, lake, machine, ports
from tide_pipeline.stack.doctor.finding import Finding
from tide_pipeline.stack.doctor.trtllm import check_trtllm


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user wants looked at. A check that has nothing to do yields nothing."""

    trtllm_source: Path | None = None      # then nothing but this is looked at
    config: TideConfig = field(default_factory=TideConfig)


Check = Callable[[Asked], Iterable[Finding]]

# In the order in which they are shown.
CHECKS: dict[str, Check] = {
    "gpu": lambda asked: _here(asked, lambda config: gpu.check_gpus(_gpus(), config, _torch_sees())),
    "machine": lambda asked: _here(asked, lambda config: machine.check_machine(machine.look(), config)),
    "lake": lambda asked: _here(asked, lambda config: lake.check_lake(config)),
    "ports": lambda asked: _here(asked, ports.check_ports),
    "TensorRT-LLM": lambda asked: check_trtllm(asked.trtllm_source),
}


def examine(asked: Asked) -> Iterator[Finding]:
    """Every check; one that can't be made is a finding too."""
    for name, check in CHECKS.items():
        try:
            yield from check(asked)
        except (TideError, OSError, SyntaxError) as error:
            yield Finding(name, "fail", str(error), "put that right and run tide doctor again")


def _here(asked: Asked, check: Callable[[TideConfig], Iterable[Finding]]) -> Iterable[Finding]:
    """Of this machine; a folder of sources that was named may be another one's."""
    return check(asked.config) if asked.trtllm_source is None else ()


def _gpus() -> list[gpu.Gpu] | None:
    text = gpu.ask_nvidia_smi()
    return None if text is None else gpu.parse_gpus(text)


def _torch_sees() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
