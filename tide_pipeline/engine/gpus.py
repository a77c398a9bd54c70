"""GPU classes by the name that recipes use: how much memory, which arithmetic. Knows no driver; asks no machine.

Memory is what nvidia-smi shows as total (ECC on), which is less than the name says.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from tide_pipeline.errors import SettingsError

MIB = 1 << 20


@dataclass(frozen=True)
class Gpu:
    """One class of card."""

    name: str
    memory_mib: int
    capability: tuple[int, int]

    @property
    def memory(self) -> int:
        """Bytes."""
        return self.memory_mib * MIB

    @property
    def has_bf16(self) -> bool:
        """Ampere and later; TensorRT-LLM serves no older card."""
        return self.capability >= (8, 0)

    @property
    def has_fp8(self) -> bool:
        """Ada and later."""
        return self.capability >= (8, 9)


GPUS = {gpu.name: gpu for gpu in (
    Gpu("h200", 143_771, (9, 0)), Gpu("h100", 81_559, (9, 0)), Gpu("a100", 81_920, (8, 0)), Gpu("a100-40", 40_960, (8, 0)),
    Gpu("l40s", 46_068, (8, 9)), Gpu("l4", 23_034, (8, 9)), Gpu("a10", 23_028, (8, 6)), Gpu("v100", 32_510, (7, 0)))}


def gpu_named(name: str) -> Gpu:
    """Raises SettingsError that lists the known classes."""
    found = GPUS.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), GPUS, n=1)
        raise SettingsError(f"no GPU class {name!r}" + (f", did you mean {near[0]!r}?" if near else f"; there are: {', '.join(GPUS)}"))
    return found
