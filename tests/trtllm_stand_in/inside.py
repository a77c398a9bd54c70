"""The stand-in in this process, for the time of a test."""

from __future__ import annotations

import contextlib
import importlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from tests.trtllm_stand_in.generate import write_stand_in
from tide_pipeline.engine.trtllm.facts import Table

PACKAGE = "tensorrt_llm"


@contextlib.contextmanager
def stand_in(line: str, table: Table | None = None) -> Iterator[ModuleType]:
    """`import tensorrt_llm` is the stand-in for a version of that line; of another table, where one is given."""
    assert not _loaded(), f"{PACKAGE} is there already: a stand-in must not hide it"
    with tempfile.TemporaryDirectory(prefix="stand-in-") as folder:
        write_stand_in(Path(folder), line, table)
        sys.path.insert(0, folder)
        importlib.invalidate_caches()
        try:
            yield importlib.import_module(PACKAGE)
        finally:
            sys.path.remove(folder)
            for name in _loaded():
                del sys.modules[name]
            importlib.invalidate_caches()


def _loaded() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == PACKAGE]
