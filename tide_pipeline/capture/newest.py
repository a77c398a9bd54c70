"""The newest of many windows, kept or counted while more are put in. Pure: knows no shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from tide_pipeline.contracts import SignalWindow

_SLACK = 4096                      # windows over the limit, before those that are too many are dropped


class Newest:
    """Of the windows put in, the `most` newest, and of each workload the `most_each` newest; None is no limit."""

    def __init__(self, most: int | None = None, most_each: int | None = None) -> None:
        self._most, self._most_each = most, most_each
        self._found: list[SignalWindow] = []
        self._fresh = 0

    @property
    def is_bounded(self) -> bool:
        """Whether there is a time before which nothing is needed, once enough is here."""
        return self._most is not None

    def put(self, window: SignalWindow) -> None:
        self._found.append(window)
        self._fresh += 1
        if self._fresh > _SLACK:
            self.windows()

    def windows(self) -> list[SignalWindow]:
        """Newest first."""
        if self._fresh:
            self._found.sort(key=lambda window: window.closed_at, reverse=True)
            self._found = self._found if self._most_each is None else _of_each(self._found, self._most_each)
            del self._found[len(self._found) if self._most is None else self._most:]
            self._fresh = 0
        return self._found

    def needs_nothing_before(self, moment: float) -> bool:
        """Whether windows closed before `moment` (Unix seconds) can't be among the newest any more."""
        return self._most is not None and len(self._found) >= self._most > 0 and moment < self.windows()[-1].closed_at


class RowCount:
    """Token rows of the windows put in, by workload, each from its own time on (Unix seconds) and until there are `enough`."""

    is_bounded = True

    def __init__(self, since: Mapping[str, float], enough: int) -> None:
        self._since, self._enough = since, enough
        self.rows = dict.fromkeys(since, 0)

    def wants(self, window: SignalWindow) -> bool:
        return self.rows.get(window.workload, self._enough) < self._enough and window.closed_at >= self._since[window.workload]

    def put(self, window: SignalWindow) -> None:
        self.rows[window.workload] += window.num_rows

    def windows(self) -> list[SignalWindow]:
        return []

    def needs_nothing_before(self, moment: float) -> bool:
        """Whether every workload has enough; older windows than the newest would do as well."""
        return all(rows >= self._enough for rows in self.rows.values())


def _of_each(windows: list[SignalWindow], most: int) -> list[SignalWindow]:
    counts: Counter[str] = Counter()
    kept = []
    for window in windows:
        counts[window.workload] += 1
        if counts[window.workload] <= most:
            kept.append(window)
    return kept
