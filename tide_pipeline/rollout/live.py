"""Figures of the acceptance log with their uncertainty: first-position acceptance, time per token, errors. Decides nothing.

Steps of one request are alike, so the error of a rate is counted over requests (a ratio estimator), and is never smaller than
that of independent steps. Time per token is compared within stretches of time, both sides at once: what slows the whole machine is no
difference between them. Stretches that are like the one before them count for less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import pyarrow as pa
import pyarrow.parquet as pq

from tide_pipeline.capture.layout import live_shards
from tide_pipeline.capture.store import Stored
from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import FinishReason
from tide_pipeline.rollout.sequential import Gap

COLUMNS = ("time", "request_id", "workload", "replica", "draft_version", "drafted", "accepted", "emitted_tokens", "duration_ms",
           "finish_reason", "mean_batch_size")
BLOCK_S = 2.0                      # stretches in which time per token is compared


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
    emitted: int = 0
    duration_ms: float = 0.0
    finish_reason: str = ""        # "" while the request goes on
    batch: float = 1.0             # requests in the same steps, on average


@dataclass(frozen=True, slots=True)
class Rate:
    """Share of accepted first draft tokens over `steps` drafted steps, and its standard error."""

    rate: float
    error: float
    steps: int
    requests: int = 0


class LiveLog:
    """Rows of the log; a shard is read once, however often it is asked for. Shards never change, so nothing is lost with this memory."""

    def __init__(self, config: TideConfig) -> None:
        self._config = config
        self._read: dict[Stored, Sequence[LiveRow]] = {}

    def rows(self, since: float) -> list[LiveRow]:
        """Rows closed at or after `since` (Unix seconds). A shard that can't be read is passed over: a bake must not die of it."""
        shards = live_shards(self._config.state.acceptance, self._config.target, since)
        self._read = {shard: self._read[shard] if shard in self._read else _read(shard) for shard in shards}
        return [row for rows in self._read.values() for row in rows if row.at >= since]


def rate_of(rows: Iterable[LiveRow], where: Callable[[LiveRow], bool] = lambda row: True) -> Rate:
    """Over the rows that match; 0 steps when none drafted."""
    requests: dict[str, list[int]] = {}
    for row in rows:
        if row.drafted and where(row):
            counts = requests.setdefault(row.request_id, [0, 0])
            counts[0] += row.drafted
            counts[1] += row.accepted
    return _ratio([(drafted, accepted) for drafted, accepted in requests.values()])


def slowdown(new: Iterable[LiveRow], old: Iterable[LiveRow]) -> Gap | None:
    """Log of the time per token, new over old, averaged over the stretches in which both answered; None where there are fewer than 4."""
    a, b = _ms_per_token(new), _ms_per_token(old)
    logs = [math.log(a[block] / b[block]) for block in sorted(a.keys() & b.keys())]
    n = len(logs)
    if n < 4:
        return None
    mean = sum(logs) / n
    spread = sum((x - mean) ** 2 for x in logs) / (n - 3)              # few blocks know their own spread badly: as Student's t is wide
    return Gap(mean, math.sqrt(spread / n) * _alike([logs]), n)


def slowdown_since(new: Iterable[LiveRow], old: Iterable[LiveRow]) -> Gap | None:
    """The same of stretches that lie one behind the other, for a replica with none beside it: mean logs at about the same batch size.

    What changed on the machine in between counts as the draft's. `n` is of the side with fewer stretches; None where too few match.
    """
    a, b = _by_batch(new), _by_batch(old)
    both = [(a[size], b[size]) for size in a.keys() & b.keys()]
    free = sum(len(x) + len(y) - 2 for x, y in both)
    if free < 4:
        return None
    weights = [len(x) * len(y) / (len(x) + len(y)) for x, y in both]
    mean = sum(w * (fmean(x) - fmean(y)) for w, (x, y) in zip(weights, both, strict=True)) / sum(weights)
    squares = sum((value - fmean(side)) ** 2 for pair in both for side in pair for value in side)
    spread = squares / max(free - 2, 1)                                # wide, as above
    error = math.sqrt(spread / sum(weights)) * _alike([side for pair in both for side in pair])
    return Gap(mean, error, min(sum(len(x) for x, _ in both), sum(len(y) for _, y in both)))


def error_rise(new: Iterable[LiveRow], old: Iterable[LiveRow]) -> Gap | None:
    """Difference of the shares of finished requests that ended with an error; None where one side finished none."""
    (a, a_variance, a_n), (b, b_variance, b_n) = _errors(new), _errors(old)
    return Gap(a - b, math.sqrt(a_variance + b_variance), min(a_n, b_n)) if a_n and b_n else None


def _read(shard: Stored) -> list[LiveRow]:
    try:
        with shard.open() as stream:
            table = pq.read_table(stream, columns=list(COLUMNS), use_threads=False)
    except (OSError, ValueError, pa.ArrowException):
        return []
    return [LiveRow(row["time"].timestamp(), row["request_id"], row["workload"], row["replica"], row["draft_version"],
                    next(iter(row["drafted"]), 0), next(iter(row["accepted"]), 0), row["emitted_tokens"], row["duration_ms"],
                    row["finish_reason"], row["mean_batch_size"]) for row in table.to_pylist()]


def _ratio(requests: list[tuple[int, int]]) -> Rate:
    steps, accepted = (sum(column) for column in zip(*requests, strict=True)) if requests else (0, 0)
    if not steps:
        return Rate(0.0, 0.0, 0)
    rate, n = accepted / steps, len(requests)
    spread = sum((a - rate * d) ** 2 for d, a in requests) * n / max(n - 1, 1) / steps**2
    smoothed = (accepted + 1) / (steps + 2)                            # 0 of 5 is not "certainly none"
    return Rate(rate, math.sqrt(max(spread, smoothed * (1 - smoothed) / steps)), steps, n)


def _ms_per_token(rows: Iterable[LiveRow]) -> dict[int, float]:
    """By stretch of BLOCK_S."""
    sums: dict[int, list[float]] = {}
    for row in rows:
        if row.emitted and row.duration_ms > 0:
            found = sums.setdefault(int(row.at // BLOCK_S), [0.0, 0.0])
            found[0] += row.duration_ms
            found[1] += row.emitted
    return {block: duration / emitted for block, (duration, emitted) in sums.items()}


def _by_batch(rows: Iterable[LiveRow]) -> dict[int, list[float]]:
    """Logs of the time per token in each stretch, by batch size: 1, 2, 3 to 5, 6 to 11, ..."""
    sizes: dict[int, list[LiveRow]] = {}
    for row in rows:
        sizes.setdefault(round(math.log2(max(row.batch, 1.0))), []).append(row)
    return {size: [math.log(ms) for _, ms in sorted(_ms_per_token(found).items())] for size, found in sizes.items()}


def _alike(sides: Sequence[Sequence[float]]) -> float:
    """How much wider an error is because a stretch is like the one before it: sqrt((1 + r) / (1 - r)), r their correlation."""
    off = [[value - fmean(side) for value in side] for side in sides]
    squares = sum(x * x for side in off for x in side)
    products = sum(x * y for side in off for x, y in pairwise(side))
    r = min(max(products / squares, 0.0), 0.9) if squares else 0.0
    return math.sqrt((1 + r) / (1 - r))


def _errors(rows: Iterable[LiveRow]) -> tuple[float, float, int]:
    """Share, its variance and the number of finished requests. What the client ended itself is no error."""
    ends = [row.finish_reason == FinishReason.ERROR for row in rows if row.finish_reason]
    if not ends:
        return 0.0, 0.0, 0
    smoothed = (sum(ends) + 1) / (len(ends) + 2)
    return sum(ends) / len(ends), smoothed * (1 - smoothed) / len(ends), len(ends)
