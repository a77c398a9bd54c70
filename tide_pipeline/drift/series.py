"""Acceptance and speed over time, for plots and live views. Knows the acceptance log; draws nothing, judges nothing.

A log row is written when a block of steps closes. Its steps are spread over the time they took, `duration_ms` up to `time`, so that
a bucket holds what was emitted in it. The newest seconds lack requests that still run: `live` measures back from the newest row instead.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from tide_pipeline.config import TideConfig
from tide_pipeline.drift.views import read


@dataclass(frozen=True, slots=True)
class Bucket:
    """What one draft version did for one workload in `seconds` from `time` on. Rates are None where nothing was drafted."""

    time: float                            # Unix seconds, a multiple of the bucket's length
    seconds: float                         # shorter than asked for at the ends of the period
    workload: str
    draft_version: str                     # "" without a draft
    first_position_rate: float | None
    acceptance_length: float | None        # over drafted steps, bonus token included
    tokens_per_s: float                    # emitted
    steps: int
    drafted_steps: int
    requests: int


@dataclass(frozen=True, slots=True)
class LiveStats:
    """The newest seconds of the log, over all workloads; `workloads` has them apart."""

    age_s: float                           # since the newest row; infinity for an empty log
    tokens_per_s: float
    acceptance_length: float               # over drafted steps; 1 where nothing was drafted
    first_position_rate: float             # 0 where nothing was drafted
    drafted_share: float                   # of steps: how much the controller speculates
    requests: int
    draft_version: str = ""                # of the newest row that has one
    workloads: tuple[Bucket, ...] = ()


_SUMS = """
       sum(s * d) as drafted, sum(s * a) as first, sum(s * k) as accepted, sum(s * tokens) as tokens, sum(s * n) as steps,
       count(distinct request_id) as requests"""
_ROWS = """
select workload, draft_version, request_id, epoch(time) as t, num_steps as n, coalesce(drafted[1], 0) as d, coalesce(accepted[1], 0) as a,
       coalesce(list_sum(accepted), 0) as k, emitted_tokens + (finish_reason <> '')::int as tokens, duration_ms / 1e3 as took
from acceptance where time >= to_timestamp(floor($since)) and epoch(time) > $since"""
# Blocks of one request lie side by side: the time they took together is theirs in common.
_SERIES = f"""
with rows as ({_ROWS}),
spans as (select workload, draft_version, request_id, t, sum(n) as n, sum(d) as d, sum(a) as a, sum(k) as k, sum(tokens) as tokens,
                 greatest(sum(took), 1e-6) as took from rows group by all),
cut as (select *, unnest(range(floor((t - took) / $bucket_s)::bigint, floor(t / $bucket_s)::bigint + 1)) as bucket from spans),
shares as (select *, (least(t, (bucket + 1) * $bucket_s, $until) - greatest(t - took, bucket * $bucket_s, $since)) / took as s from cut)
select bucket * $bucket_s as begin, workload, draft_version, {_SUMS}
from shares where s > 0 group by all order by begin, workload, draft_version
"""  # noqa: S608 - values are bound
_LIVE = f"""
with rows as ({_ROWS} and epoch(time) <= $until), newest as (select max(t) as newest from rows),
window_rows as (select *, 1 as s from rows, newest where t > newest - $window_s)
select workload, draft_version, max(t), {_SUMS} from window_rows group by all order by workload, draft_version
"""  # noqa: S608


def acceptance_series(config: TideConfig, since: float, bucket_s: float, now: float | None = None) -> list[Bucket]:
    """Buckets from `since` to `now` (Unix seconds) with traffic in them, by time, workload and draft version. Raises LakeError."""
    until = time.time() if now is None else now
    rows = read(config, _SERIES, {"since": since, "until": until, "bucket_s": float(bucket_s)}, since=since)
    out = []
    for begin, workload, version, *sums in rows:
        seconds = min(begin + bucket_s, until) - max(begin, since)
        out.append(_bucket(begin, seconds, workload, version, *sums))
    return out


def live(config: TideConfig, window_s: float = 5.0, now: float | None = None) -> LiveStats:
    """The newest `window_s` seconds of the log, if it has rows of the last minute. Raises LakeError."""
    now = time.time() if now is None else now
    since = now - max(60.0, 2 * window_s)
    rows = read(config, _LIVE, {"since": since, "until": now, "window_s": float(window_s)}, since=since)
    if not rows:
        return LiveStats(math.inf, 0.0, 1.0, 0.0, 0.0, 0)
    newest = max(last for _, _, last, *_ in rows)
    buckets = tuple(_bucket(newest - window_s, window_s, workload, version, *sums) for workload, version, _, *sums in rows)
    drafted, first, accepted, tokens, steps, requests = (sum(row[i] for row in rows) for i in range(3, 9))
    _, draft_version = max(((last, version) for _, version, last, *_ in rows if version), default=(0.0, ""))
    return LiveStats(now - newest, tokens / window_s, 1 + accepted / max(drafted, 1), first / max(drafted, 1), drafted / max(steps, 1),
                     requests, draft_version, buckets)


def _bucket(begin: float, seconds: float, workload: str, version: str, drafted: float, first: float, accepted: float, tokens: float,
            steps: float, requests: int) -> Bucket:
    rate, length = (first / drafted, 1 + accepted / drafted) if drafted > 0 else (None, None)
    return Bucket(begin, seconds, workload, version, rate, length, tokens / max(seconds, 1e-6), round(steps), round(drafted), requests)
