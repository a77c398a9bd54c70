"""Write what was captured as shards, from a thread of its own. Knows queues; knows neither requests nor rings.

A shard is complete or absent (store.py). A disk or bucket that says no costs nothing that fits the queues: it is tried again with growing
pauses, and `stats()` says why. What does not fit is dropped and counted.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from tide_pipeline.capture.encode import acceptance_tables, signals_tables
from tide_pipeline.capture.lane import Lane, LaneLimits
from tide_pipeline.capture.names import new_shard
from tide_pipeline.capture.schema import ACCEPTANCE_SCHEMA, SIGNALS_SCHEMA
from tide_pipeline.capture.shard import write_shard
from tide_pipeline.capture.store import Root, open_store
from tide_pipeline.capture.windows import ClosedWindow
from tide_pipeline.config import CaptureSettings
from tide_pipeline.contracts import AcceptanceRow
from tide_pipeline.errors import SettingsError

T = TypeVar("T")

MAX_QUEUED_BYTES = 512 * 2**20     # of states waiting for the disk, whatever queue_windows allows
MAX_QUEUED_ROWS = 50_000           # acceptance rows waiting for the disk
ACCEPTANCE_SHARD_ROWS = 20_000
SHARD_BYTES = 48 * 2**20           # of states in one shard, and one window more: it must fit an object (store.MAX_OBJECT)


@dataclass(frozen=True, slots=True)
class _Dataset(Generic[T]):
    """One dataset's queue and how its items become a file."""

    name: str
    schema: Any
    tables: Callable[[list[T]], Iterator[Any]]
    lane: Lane[T]


class LakeWriter:
    """Takes windows and rows without blocking; a daemon thread puts them under `lake/signals` and `lake/acceptance`."""

    def __init__(self, settings: CaptureSettings, target: str, lake: Root, replica: str) -> None:
        self._target, self._lake, self._replica = target, lake, replica
        self._windows: _Dataset[ClosedWindow] = _Dataset("signals", SIGNALS_SCHEMA, signals_tables, Lane(
            LaneLimits(settings.queue_windows, MAX_QUEUED_BYTES, settings.shard_rows, settings.flush_s, SHARD_BYTES)))
        self._rows: _Dataset[AcceptanceRow] = _Dataset("acceptance", ACCEPTANCE_SCHEMA, acceptance_tables, Lane(
            LaneLimits(MAX_QUEUED_ROWS, MAX_QUEUED_BYTES, ACCEPTANCE_SHARD_ROWS, settings.flush_s)))
        self._datasets: tuple[_Dataset[Any], ...] = (self._rows, self._windows)
        self._written_shards = self._written_bytes = self._write_errors = 0
        self._flushes_asked = self._flushes_done = 0
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="lake-writer", daemon=True)
        self._thread.start()

    def offer_window(self, window: ClosedWindow) -> bool:
        """Queue a window; False when it was dropped."""
        return self._offer(self._windows, window, window.num_rows, window.num_bytes)

    def offer_row(self, row: AcceptanceRow) -> bool:
        """Queue an acceptance row; False when it was dropped."""
        return self._offer(self._rows, row, 1, 0)

    def flush(self, timeout_s: float = 30.0) -> bool:
        """Write all that waits, now. False when the disk refused some of it or time ran out."""
        with self._changed:
            self._flushes_asked += 1
            mine = self._flushes_asked
            self._changed.notify_all()
            in_time = self._changed.wait_for(lambda: self._flushes_done >= mine or not self._thread.is_alive(), timeout_s)
            return in_time and not any(len(d.lane) for d in self._datasets)

    def close(self, timeout_s: float = 30.0) -> None:
        """Write all that waits and stop the thread. What the disk refuses now is lost, and counted. Can be called again."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def stats(self) -> dict[str, int | float | bool | str]:
        with self._changed:
            return {
                "dropped_windows": self._windows.lane.dropped_items, "dropped_tokens": self._windows.lane.dropped_rows,
                "dropped_acceptance_rows": self._rows.lane.dropped_items,
                "queued_windows": len(self._windows.lane), "queued_acceptance_rows": len(self._rows.lane),
                "written_shards": self._written_shards, "written_bytes": self._written_bytes, "write_errors": self._write_errors,
                "writer_error": "; ".join(f"{d.name}: {d.lane.error}" for d in self._datasets if d.lane.error),
            }

    def _offer(self, dataset: _Dataset[T], item: T, rows: int, num_bytes: int) -> bool:
        now = time.monotonic()
        with self._changed:
            if self._closing:
                dataset.lane.drop(1, rows)
                return False
            due_before = dataset.lane.due_at()
            taken = dataset.lane.offer(item, rows, num_bytes, now)
            if dataset.lane.due_at() < due_before:         # the thread sleeps until the old time
                self._changed.notify_all()
            return taken

    def _run(self) -> None:
        closing = False
        while not closing:
            with self._changed:
                if not self._closing and self._flushes_asked == self._flushes_done:
                    self._changed.wait(self._sleep_s())
                closing, flushing = self._closing, self._flushes_asked
                forced = closing or flushing > self._flushes_done
            for dataset in self._datasets:
                self._drain(dataset, forced)
            with self._changed:
                if closing:
                    for dataset in self._datasets:
                        if waiting := len(dataset.lane):
                            dataset.lane.refuse(waiting, dataset.lane.error)
                self._flushes_done = flushing
                self._changed.notify_all()

    def _sleep_s(self) -> float | None:
        due_at = min(d.lane.due_at() for d in self._datasets)
        return None if due_at == float("inf") else max(0.0, due_at - time.monotonic())

    def _drain(self, dataset: _Dataset[Any], forced: bool) -> None:
        """Write shards until nothing is due (forced: until nothing waits), or until the disk refuses."""
        while True:
            with self._changed:
                due = len(dataset.lane) > 0 if forced else dataset.lane.due_at() <= time.monotonic()
                batch = dataset.lane.batch() if due else []
            if not batch or not self._write(dataset, batch):
                return

    def _write(self, dataset: _Dataset[Any], batch: list[Any]) -> bool:
        try:
            size = self._write_shard(dataset, batch)
        except Exception as error:             # nothing may end this thread
            is_disk = isinstance(error, OSError | SettingsError)           # a key file can be put right too
            advice = f"free or repair {self._lake}; {len(batch)} or more items wait" if is_disk else "items dropped, please report this"
            message = f"{type(error).__name__}: {error} ({advice})"
            with self._changed:
                self._write_errors += 1
                if is_disk:
                    dataset.lane.failed(message, time.monotonic())
                else:
                    dataset.lane.refuse(len(batch), message)
            return not is_disk
        with self._changed:
            dataset.lane.done(len(batch))
            self._written_shards += 1
            self._written_bytes += size
        return True

    def _write_shard(self, dataset: _Dataset[Any], batch: list[Any]) -> int:
        store = open_store(f"{os.fspath(self._lake)}/{dataset.name}")      # here, not in __init__: a bucket that is away stops no engine
        return write_shard(store, new_shard(self._target, self._replica), self._target, dataset.schema, dataset.tables(batch)).size
