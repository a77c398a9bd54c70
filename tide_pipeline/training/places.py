"""Pinned windows, read wherever maintenance has put them since. Knows the lake's reader; knows no batches and no draft.

A window is known by its request, position, rows, closing time and digest: compaction moves its row to another shard and changes none of
these. A window that no listing shows any more was deleted (a tombstone covers it) or has expired (retention).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from tide_pipeline.capture.reader import Identity, WindowStates, find_again, identity, read_states
from tide_pipeline.capture.store import Root
from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import SignalWindow
from tide_pipeline.errors import NotEnoughSignals

GONE = "deleted or expired: no shard of the lake holds it any more"
_TRIES = 3                         # compactions that may come between listing and reading

OnSkip = Callable[[SignalWindow, str], None]


class WindowReader:
    """Reads windows of one target out of several lakes: what was captured, and what ships with the engine."""

    def __init__(self, roots: Sequence[Root], target: str) -> None:
        self.roots, self.target = roots, target

    def locate(self, windows: Sequence[SignalWindow]) -> tuple[list[SignalWindow], list[SignalWindow]]:
        """`windows`, in their order, at their present places; and those that are gone. Reads small columns only."""
        known = {identity(w) for w in windows}
        places = {identity(w): (w.uri, w.row) for root in self.roots for w in self._found(root, known)}
        present = [dataclasses.replace(w, uri=places[identity(w)][0], row=places[identity(w)][1]) for w in windows if identity(w) in places]
        return present, [w for w in windows if identity(w) not in places]

    def read(self, windows: Sequence[SignalWindow], on_skip: OnSkip) -> Iterator[WindowStates]:
        """States of `windows`, shard by shard, one row group in memory at a time. What is damaged or gone goes to `on_skip`."""
        wanted = list(windows)
        for _ in range(_TRIES):
            lost: list[tuple[SignalWindow, str]] = []
            yield from read_states(wanted, on_skip=_collector(lost))
            if not lost:
                return
            wanted = self._moved(lost, on_skip)
        for window in wanted:
            on_skip(window, "moved again and again while it was read: wait for the maintenance")

    def _moved(self, lost: Sequence[tuple[SignalWindow, str]], on_skip: OnSkip) -> list[SignalWindow]:
        """Of windows that were not where they should be, those that are elsewhere now."""
        present, gone = self.locate([window for window, _ in lost])
        for window in gone:
            on_skip(window, GONE)
        before = {identity(window): (window, reason) for window, reason in lost}
        moved = []
        for window in present:
            old, reason = before[identity(window)]
            if (old.uri, old.row) == (window.uri, window.row):
                on_skip(window, reason)
            else:
                moved.append(window)
        return moved

    def _found(self, root: Root, known: set[Identity]) -> list[SignalWindow]:
        try:
            return find_again(root, self.target, known).windows
        except NotEnoughSignals:
            return []


def window_reader(config: TideConfig) -> WindowReader:
    """Over everything `find_windows` looks at."""
    return WindowReader([config.state.signals, config.engine_dir / "replay"], config.target)


def _collector(lost: list[tuple[SignalWindow, str]]) -> OnSkip:
    return lambda window, reason: lost.append((window, reason))
