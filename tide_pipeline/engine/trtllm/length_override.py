"""The draft length of every pass, asked of us instead of the schedule. Private; the schedule alone decides where it is not there.

It keeps lengths at 1 or more: a batch above a schedule's last key would get 0, after which the draft of every request in flight is stale.
Newer servers ask with a floor of their own, and keep the draft's cache filled at 0: what they give beyond the three names is passed on.
`choose` may change lengths while the server runs. Pairs of batch size and length that are not in the schedule have no CUDA graph: such
passes run without one, so this is for servers without graphs, or to choose among what was captured.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from tide_pipeline.engine.trtllm.facts import Table
from tide_pipeline.engine.trtllm.schedule import FLOOR, length_at

NAME = "get_draft_len_for_batch_size"


class LengthOverride:
    """`install()` before passes run. NVIDIA's own test replaces the function in the same way."""

    def __init__(self, table: Table, longest: int) -> None:
        self._module, self._longest = table[NAME].module, longest
        self._chosen: Mapping[int, int] = {}
        self._undo: list[Callable[[], None]] = []

    def choose(self, schedule: Mapping[int, int]) -> None:
        """{largest batch: length}, from the next pass on; {} leaves it to the server's own schedule. Any thread."""
        self._chosen = dict(schedule)

    def install(self) -> None:
        """In the module and wherever it was imported to by name."""
        original = getattr(importlib.import_module(self._module), NAME)

        def chosen(draft_len_schedule: Any, batch_size: int, max_draft_len: int, *floor: Any, **named: Any) -> int:
            own = length_at(self._chosen, batch_size) or original(draft_len_schedule, batch_size, max_draft_len, *floor, **named)
            return max(FLOOR, min(int(own), self._longest))

        for module in [m for name, m in list(sys.modules.items()) if name.partition(".")[0] == "tensorrt_llm" and m is not None]:
            if vars(module).get(NAME) is original:
                setattr(module, NAME, chosen)
                self._undo.append(lambda module=module: setattr(module, NAME, original))       # type: ignore[misc]

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()
