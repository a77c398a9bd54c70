"""Import what the steps behind training need while the trainer works. Knows module names; nothing depends on its having happened.

The run's process only waits then, and MLflow and torch take seconds to import, between a trained draft and traffic.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Iterator, Sequence

AFTER_S = 10.0                             # the trainer starts first: it imports torch itself, on the same cores
LATER = ("tide_pipeline.build.engine", "tide_pipeline.gate.run", "tide_pipeline.rollout.promote")


@contextlib.contextmanager
def importing(modules: Sequence[str] = LATER, after_s: float = AFTER_S) -> Iterator[None]:
    """In a thread, `after_s` into the block; not at all where the block ends sooner."""
    timer = threading.Timer(after_s, _load, [modules])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _load(modules: Sequence[str]) -> None:
    from tide_pipeline.registry.client import load_mlflow

    with contextlib.suppress(Exception):   # the step that needs it will say it better
        load_mlflow()
        for name in modules:
            importlib.import_module(name)
