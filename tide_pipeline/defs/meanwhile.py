"""What can be done for the steps behind training while the trainer works. Nothing depends on its having happened.

The run's process only waits then. Between a trained draft and traffic it would import MLflow and torch, which takes seconds, and replay the
champion on the held-out windows.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

AFTER_S = 10.0                             # the trainer starts first: it imports torch itself, on the same cores
AGAIN_S = 20.0                             # the work is done again as often, for what has come since; a tenth of the time at most
LATER = ("tide_pipeline.build.engine", "tide_pipeline.gate.run", "tide_pipeline.rollout.promote")


@contextlib.contextmanager
def meanwhile(work: Callable[[], object] = lambda: None, modules: Sequence[str] = LATER, *, after_s: float = AFTER_S,
              again_s: float = AGAIN_S) -> Iterator[None]:
    """In a thread, from `after_s` into the block until its end: import `modules`, then call `work` again and again.

    What `work` has begun it ends, beside what comes after the block. Errors are left to the step that needs the same.
    """
    ended = threading.Event()
    threading.Thread(target=_prepare, args=(ended, work, modules, after_s, again_s), name="meanwhile", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _prepare(ended: threading.Event, work: Callable[[], object], modules: Sequence[str], after_s: float, again_s: float) -> None:
    if ended.wait(after_s):
        return
    with contextlib.suppress(Exception):
        _load(modules)
    while not ended.is_set():
        began = time.monotonic()
        with contextlib.suppress(Exception):
            work()
        ended.wait(max(again_s, 9 * (time.monotonic() - began)))


def _load(modules: Sequence[str]) -> None:
    from tide_pipeline.registry.client import load_mlflow

    load_mlflow()
    for name in modules:
        importlib.import_module(name)
