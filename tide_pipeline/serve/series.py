"""Metric families of Triton's endpoint: values that are set, totals that grow, histograms. Knows kinds; no metric's name.

Each change is a call into the server, so what has not changed is not told again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tide_pipeline.serve.histogram import Reading
from tide_pipeline.serve.orphan import is_orphan


class Series:
    """One metric family, its members made when their first value is known; a counter takes running totals."""

    def __init__(self, pb_utils: Any, name: str, description: str, labels: Mapping[str, str], *, is_counter: bool) -> None:
        self._labels, self._is_counter = dict(labels), is_counter
        family = pb_utils.MetricFamily
        self._family = family(name=name, description=description, kind=family.COUNTER if is_counter else family.GAUGE)
        self._members: dict[tuple[tuple[str, str], ...], tuple[Any, float]] = {}

    def put(self, value: float, **labels: str) -> None:
        key = tuple(sorted(labels.items()))
        known = self._members.get(key)
        if is_orphan() or (known is not None and known[1] == value):
            return
        metric, before = known or (self._family.Metric(labels={**self._labels, **labels}), 0.0)
        if self._is_counter:
            metric.increment(max(0.0, value - before))
        else:
            metric.set(value)
        self._members[key] = (metric, value)

    def clear_others(self, label: str, values: set[str]) -> None:
        """0 for the members with other values of a label: a draft that is no longer served must not look alive. Triton keeps the series."""
        for key in self._members:
            if dict(key)[label] not in values:
                self.put(0.0, **dict(key))


class HistogramSeries:
    """`<name>_bucket`, `_sum` and `_count` as Prometheus and Grafana's histogram_quantile() read them; to Triton they are counters."""

    def __init__(self, pb_utils: Any, name: str, description: str, labels: Mapping[str, str]) -> None:
        self._buckets, self._sum, self._count = (
            Series(pb_utils, f"{name}_{part}", f"{description} ({what})", labels, is_counter=True)
            for part, what in (("bucket", "at most le seconds"), ("sum", "seconds in all"), ("count", "how many")))

    def put(self, reading: Reading) -> None:
        for bound, count in reading.at_most.items():
            self._buckets.put(count, le=bound)
        self._sum.put(reading.total)
        self._count.put(reading.count)
