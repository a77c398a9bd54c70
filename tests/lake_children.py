"""Processes that work on a lake and die on it: at any moment (`kill -9`), or at the n-th thing they do to the disk (`Doom`)."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fakes_capture import TARGET, FakeEngine, make_recorder
from tide_pipeline.capture import compact
from tide_pipeline.capture.reader import list_windows, live_shards, read_states
from tide_pipeline.capture.store import Store
from tide_pipeline.errors import LakeError, NotEnoughSignals

_context = multiprocessing.get_context("forkserver")       # forks a process without threads, with everything imported
_context.set_forkserver_preload(["tests.lake_children"])


class Doom:
    """Ends this process, without a goodbye, before its n-th change to the disk: after the one before it."""

    def __init__(self, step: int) -> None:
        self._left = step
        os.fsync = lambda _: None                          # a process that dies loses nothing by it, and the test much time
        for owner, name in ((os, "mkdir"), (os, "open"), (os, "fsync"), (os, "replace"), (Store, "remove")):
            setattr(owner, name, self._around(getattr(owner, name)))

    def _around(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def doomed(*args: Any, **kwargs: Any) -> Any:
            if self._left == 0:
                os._exit(9)
            self._left -= 1
            return change(*args, **kwargs)

        return doomed


def start(work: Callable[..., object], *args: object) -> Any:
    child = _context.Process(target=work, args=args)
    child.start()
    return child


def die_at_every_step(base: Path, work: Callable[[Path], object], template: Path | None = None) -> list[Path]:
    """Copies of `template` on which `work` died at its first, second, ... step; in the last one it came to its end."""
    child = start(_die_at_every_step, base, work, template)
    child.join(120)
    assert child.exitcode == 0
    return sorted(base.iterdir(), key=lambda path: int(path.name))


def _die_at_every_step(base: Path, work: Callable[[Path], object], template: Path | None) -> None:
    base.mkdir()
    write_one(base.parent / "first")                       # what a library does once, it need not do in every fork
    for step in itertools.count():
        folder = base / str(step)
        if template is not None:
            shutil.copytree(template, folder)
        pid = os.fork()                                    # the writer's thread has ended
        if pid == 0:
            Doom(step)
            work(folder)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == 0:
            return
        assert code == 9, f"step {step} ended with {code}"


def write_for_ever(lake: Path, name: str) -> None:
    """One request after the other, each flushed; `told` lists those that are on disk."""
    recorder = make_recorder(lake)
    engine = FakeEngine(recorder)
    with (lake.parent / f"told-{name}").open("a") as told:
        for i in itertools.count():
            engine.run(f"{name}-{i}", tenant=random.choice("ab"))
            if recorder.flush():
                told.write(f"{name}-{i}\n")
                told.flush()


def write_one(lake: Path) -> None:
    recorder = make_recorder(lake)
    FakeEngine(recorder).run("r")
    recorder.close()


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def told(lake: Path) -> set[str]:
    return {line.strip() for file in lake.parent.glob("told-*") for line in file.read_text().splitlines()}


def requests_in(lake: Path) -> Counter[str]:
    """Requests as the trainer sees them, with their number of windows; every shard is whole and every window reads."""
    try:
        index = list_windows(lake / "signals", TARGET)
    except NotEnoughSignals:
        return Counter()
    assert index.skipped == []
    states = list(read_states(index.windows, strict=True))
    assert len(states) == len(index.windows)
    assert all(Path(shard).stat().st_size == shard.size for shard in live_shards(lake / "signals", TARGET))
    return Counter(window.request_id for window in index.windows)


def compact_for_ever(lake: Path) -> None:
    """As impatient as can be: open hours too, and the old shards go at once."""
    compact.MIN_SHARDS = 2
    while True:
        with contextlib.suppress(LakeError):               # the other one was there first
            compact.compact(lake, grace_s=0.1, settle_s=0.0)
        time.sleep(0.05)
