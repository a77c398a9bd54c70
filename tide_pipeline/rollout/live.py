"""First-position acceptance in the acceptance log, with its uncertainty. Knows Parquet columns; decides nothing.

Steps of one request are alike, so the error of a rate is counted over requests (a ratio estimator), and is never smaller than
that of independent steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from tide_pipeline.capture.layout import live_shards
from tide_pipeline.config import TideConfig

COLUMNS = ("time", "request_id", "workload", "replica", "draft_version", "drafted", "accepted")


@dataclass(frozen=True, slots=True)
class LiveRow:
    """One closed block of steps; `drafted` and `accepted` count its first draft positions."""

    at: float
    request_id: str
    workload: str
    replica: str
    draft_version: str
    drafted: int
    accepted: int


@dataclass(frozen=True, slots=True)
class Rate:
    """Share of accepted first draft tokens over `steps` drafted steps, and its standard error."""

    rate: float
    error: float
    steps: int


def read_live(config: TideConfig, since: float) -> list[LiveRow]:
    """Rows closed at or after `since` (Unix seconds). A shard that can't be read is passed over: a bake must not die of it."""
    found: list[LiveRow] = []
    for shard in live_shards(config.state.acceptance, config.target, since):
        try:
            with shard.open() as stream:
                table = pq.read_table(stream, columns=list(COLUMNS), use_threads=False)
        except (OSError, ValueError, pa.ArrowException):
            continue
        for row in table.to_pylist():
            if row["time"].timestamp() >= since:
                found.append(LiveRow(row["time"].timestamp(), row["request_id"], row["workload"], row["replica"], row["draft_version"],
                                     next(iter(row["drafted"]), 0), next(iter(row["accepted"]), 0)))
    return found


def rate_of(rows: Iterable[LiveRow], where: Callable[[LiveRow], bool]) -> Rate:
    """Over the rows that match; 0 steps when none drafted."""
    requests: dict[str, list[int]] = {}
    for row in rows:
        if row.drafted and where(row):
            counts = requests.setdefault(row.request_id, [0, 0])
            counts[0] += row.drafted
            counts[1] += row.accepted
    return _ratio([(drafted, accepted) for drafted, accepted in requests.values()])


def _ratio(requests: list[tuple[int, int]]) -> Rate:
    steps, accepted = (sum(column) for column in zip(*requests, strict=True)) if requests else (0, 0)
    if not steps:
        return Rate(0.0, 0.0, 0)
    rate, n = accepted / steps, len(requests)
    spread = sum((a - rate * d) ** 2 for d, a in requests) * n / max(n - 1, 1) / steps**2
    smoothed = (accepted + 1) / (steps + 2)                            # 0 of 5 is not "certainly none"
    return Rate(rate, math.sqrt(max(spread, smoothed * (1 - smoothed) / steps)), steps)
