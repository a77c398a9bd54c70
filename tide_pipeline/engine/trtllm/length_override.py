"""The draft length of every pass, kept at 1 or more whatever the server's schedule says. Private; where it is not there, nothing is lost
as long as the schedule covers every batch size (options.py refuses one that does not).

At length 0 (a batch above the schedule's last key) the draft of every request in flight goes stale. Newer servers ask with a floor of their
own, and keep the draft's cache filled at 0: what they give beyond the three names is passed on. Lengths are not chosen anew while it runs:
pairs of batch size and length that are not in its schedule have no CUDA graph. A schedule learned since goes in with the next build.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from tide_pipeline.engine.trtllm.facts import Table
from tide_pipeline.engine.trtllm.schedule import FLOOR

NAME = "get_draft_len_for_batch_size"


class LengthOverride:
    """`install()` before passes run. NVIDIA's own test replaces the function in the same way."""

    def __init__(self, table: Table, longest: int) -> None:
        self._module, self._longest = table[NAME].module, longest
        self._undo: list[Callable[[], None]] = []

    def install(self) -> None:
        """In the module and wherever it was imported to by name."""
        original = getattr(importlib.import_module(self._module), NAME)

        def bounded(draft_len_schedule: Any, batch_size: int, max_draft_len: int, *floor: Any, **named: Any) -> int:
            return max(FLOOR, min(int(original(draft_len_schedule, batch_size, max_draft_len, *floor, **named)), self._longest))

        for module in [m for name, m in list(sys.modules.items()) if name.partition(".")[0] == "tensorrt_llm" and m is not None]:
            if vars(module).get(NAME) is original:
                setattr(module, NAME, bounded)
                self._undo.append(lambda module=module: setattr(module, NAME, original))       # type: ignore[misc]

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()
