"""A bounded queue of what waits for one dataset's next shard, with its age and its back-off. Knows neither threads nor files.

The writer holds one lock around every call here; each call is short.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

FIRST_PAUSE_S = 0.5                # after a failed write; doubles
LONGEST_PAUSE_S = 30.0


@dataclass(frozen=True, slots=True)
class LaneLimits:
    items: int                     # waiting items; one more is dropped
    bytes: int
    shard_rows: int                # rows that make a shard without waiting
    age_s: float                   # a shard is written at this age of its oldest item at the latest
    shard_bytes: float = float("inf")      # bytes that make a shard without waiting


class Lane(Generic[T]):
    """Items stay queued until their shard is in place: a failed write loses nothing that fits."""

    def __init__(self, limits: LaneLimits) -> None:
        self.limits = limits
        self.dropped_items = 0
        self.dropped_rows = 0
        self.error = ""
        self._items: deque[tuple[T, int, int, float]] = deque()     # item, rows, bytes, arrival
        self._rows = 0
        self._bytes = 0
        self._pause_s = 0.0
        self._retry_at = 0.0

    def __len__(self) -> int:
        return len(self._items)

    def offer(self, item: T, rows: int, num_bytes: int, now: float) -> bool:
        """Queue an item, or drop and count it."""
        if len(self._items) >= self.limits.items or (self._items and self._bytes + num_bytes > self.limits.bytes):
            self.drop(1, rows)
            return False
        self._items.append((item, rows, num_bytes, now))
        self._rows += rows
        self._bytes += num_bytes
        return True

    def due_at(self) -> float:
        """Monotonic time at which the next shard should be written; infinity while nothing waits."""
        if not self._items:
            return float("inf")
        is_full = self._rows >= self.limits.shard_rows or self._bytes >= self.limits.shard_bytes
        ripe_at = 0.0 if is_full else self._items[0][3] + self.limits.age_s
        return max(ripe_at, self._retry_at)

    def batch(self) -> list[T]:
        """The oldest items, up to a shard's worth: one at least, and no more bytes than fit. They stay queued until `done`."""
        rows = itertools.accumulate((rows for _, rows, _, _ in self._items), initial=0)
        until = itertools.accumulate(num_bytes for _, _, num_bytes, _ in self._items)
        return [entry[0] for i, (entry, before, size) in enumerate(zip(self._items, rows, until, strict=False))
                if i == 0 or (before < self.limits.shard_rows and size <= self.limits.shard_bytes)]

    def done(self, count: int) -> None:
        """The oldest `count` items are on disk."""
        self._forget(count)
        self.error, self._pause_s, self._retry_at = "", 0.0, 0.0

    def refuse(self, count: int, error: str) -> None:
        """The oldest `count` items can't be written at all: drop them, or they would block the rest for ever."""
        self.drop(count, self._forget(count))
        self.error = error

    def failed(self, error: str, now: float) -> None:
        """The disk said no: keep everything and wait."""
        self._pause_s = min(LONGEST_PAUSE_S, max(FIRST_PAUSE_S, 2 * self._pause_s))
        self._retry_at = now + self._pause_s
        self.error = error

    def _forget(self, count: int) -> int:
        gone = [self._items.popleft() for _ in range(count)]
        rows = sum(entry[1] for entry in gone)
        self._rows -= rows
        self._bytes -= sum(entry[2] for entry in gone)
        return rows

    def drop(self, items: int, rows: int) -> None:
        """Count what never came in, or had to go."""
        self.dropped_items += items
        self.dropped_rows += rows
