"""All checks of `tide doctor`, and how they are run. A check is a function of `Asked` that yields findings; a new one goes into CHECKS."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tide_pipeline.errors import TideError
from tide_pipeline.stack.doctor.finding import Finding
from tide_pipeline.stack.doctor.trtllm import check_trtllm


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user wants looked at. A check that has nothing to do yields nothing."""

    trtllm_source: Path | None = None


Check = Callable[[Asked], Iterable[Finding]]

# In the order in which they are shown.
CHECKS: dict[str, Check] = {
    "TensorRT-LLM": lambda asked: check_trtllm(asked.trtllm_source),
}


def examine(asked: Asked) -> Iterator[Finding]:
    """Every check; one that can't be made is a finding too."""
    for name, check in CHECKS.items():
        try:
            yield from check(asked)
        except (TideError, OSError, SyntaxError) as error:
            yield Finding(name, "fail", str(error), "put that right and run tide doctor again")
