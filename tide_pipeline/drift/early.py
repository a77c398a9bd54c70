"""The early life of a draft version: what it was worth when it was promoted. Knows the log; decides nothing.

Its first N drafted steps, of MIN_REQUESTS requests or more, over all workloads and of each that was served then; fixed once complete.
Where requests differ so much that this says little (a standard error above PRECISE), it is twice as many, up to eight times.
The log is read from the version's first hour on, a few hours and at most MOST_ROWS rows at a time, and only rows that can be among the
first are kept: a log of any size takes the same memory, and is read no further than needed. A life that is not complete goes on where
the last look ended; one that is, is noted (promoted.py) and never read again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa

from tide_pipeline.capture.layout import first_day
from tide_pipeline.config import DriftSettings, TideConfig
from tide_pipeline.contracts import ANY_WORKLOAD
from tide_pipeline.drift.acceptance import FINISH, MIN_REQUESTS
from tide_pipeline.drift.promoted import Early, EarlyLife, note, noted
from tide_pipeline.drift.rates import RateEstimate, clustered
from tide_pipeline.drift.views import read

PRECISE = 0.05                     # a baseline with a larger standard error hides falls of 0.1 for as long as its draft is served
TIMES = (1, 2, 4, 8)               # N and MIN_REQUESTS
LATE_S = 600.0                     # rows may come that much later than they were closed: a disk that refused, clocks that differ
HOUR_S, MOST_HOURS = 3600.0, 6    # read at a time: one hour first, then twice as many each time
MOST_ROWS = 8192                   # looked through at a time: the oldest of those hours first

_KEPT = pa.schema([("workload", pa.string()), ("request_id", pa.string()), ("t", pa.float64()), ("n", pa.int32()), ("d", pa.int32()),
                   ("a", pa.int32())])
# `chosen`: of rows(id, workload, request_id, t, n, d, a), those among the first of all (scope ANY_WORKLOAD) or of their workload.
_CHOSEN = f"""
life as (select '{ANY_WORKLOAD}' as scope, * from rows union all select workload as scope, * from rows),
marked as (select *, (row_number() over (partition by scope, request_id order by t) = 1)::int as opens from life),
counted as (select *, sum(d) over older - d as steps_before, sum(opens) over older - opens as requests_before
            from marked window older as (partition by scope order by t, request_id rows unbounded preceding)),
early as (select *, 0 as slice from counted where steps_before < $steps or requests_before < $requests),
chosen as (select * from early where scope = '{ANY_WORKLOAD}' or scope in (select workload from early where scope = '{ANY_WORKLOAD}'))"""  # noqa: S608
# Of the oldest rows since `begin`, those that may count, and up to where all were seen (null: to the end); rows of one instant together.
_KEEP = f"""
with new as (select time, workload, request_id, epoch(time) as t, num_steps as n, drafted[1] as d, accepted[1] as a from acceptance
             where draft_version = $version and draft_length > 0 and time >= $begin
               and ($workloads::varchar[] is null or list_contains($workloads::varchar[], workload) or epoch(time) <= $end)
             order by time, request_id limit $most),
reach as (select case when count(*) = $most then max(time) end as until from new),
rows as (select row_number() over () as id, * from (
            select * from kept union all select workload, request_id, t, n, d, a from new, reach where until is null or time < until)),
{_CHOSEN},
picked as (select any_value(workload) as workload, any_value(request_id) as request_id, any_value(t) as t, any_value(n) as n,
                  any_value(d) as d, any_value(a) as a from chosen group by id)
select epoch_us(until), picked.* from reach left join picked on true
"""  # noqa: S608 - values are bound
_RATES = f"with rows as (select 0 as id, * from kept), {_CHOSEN}, {FINISH}"  # noqa: S608


@dataclass(frozen=True, slots=True)
class _Seen:
    """What is known of a version's early life after a look."""

    life: EarlyLife = field(default_factory=EarlyLife)
    rows: Sequence[tuple[Any, ...]] = ()           # of _KEPT
    looked_at: float = float("-inf")               # all that was in the log then has been seen


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_seen: dict[tuple[str, str, str, str, int], _Seen] = {}


def baseline_steps(settings: DriftSettings) -> int:
    """N: drafted steps that make an early life complete."""
    return max(2 * settings.min_steps, 400)


def is_settled(estimate: RateEstimate, steps: int, times: int) -> bool:
    """Whether `times` N = `steps` are there, and say enough or are as many as are waited for."""
    is_there = estimate.steps >= times * steps and estimate.requests >= times * MIN_REQUESTS
    return is_there and (math.sqrt(estimate.variance) <= PRECISE or times == TIMES[-1])


def early_life(config: TideConfig, version: str, since: float | None) -> EarlyLife:
    """Of a draft version that served from `since` (Unix seconds; None: the lake's first day) on. Raises LakeError."""
    steps = baseline_steps(config.drift)
    key = (str(config.state.root), str(config.state.acceptance), config.target, version, steps)
    seen = _seen.get(key) or _Seen(noted(config, version, steps) or EarlyLife())
    if not seen.life.is_final:
        seen = _look(config, version, since, seen)
        if seen.life.is_final:
            note(config, version, steps, seen.life)
    _seen[key] = seen
    return seen.life


def _look(config: TideConfig, version: str, since: float | None, seen: _Seen) -> _Seen:
    begun = time.time()
    is_first = seen.looked_at == float("-inf")
    after = 0.0 if is_first else seen.looked_at - LATE_S
    begin = (first_day(config.state.acceptance, config.target) if since is None else since) if is_first else after
    life = seen.life
    rows: Sequence[tuple[Any, ...]] = [row for row in seen.rows if row[2] <= after]    # later ones are read again, and those that came late
    for period in _periods(begin, begun) if begin is not None else ():
        life, rows = _through(config, version, period, after, life, rows)
        if life.is_final and period[1] is not None and period[1] > _end_of(life) + LATE_S:
            break
    return _Seen(life, () if life.is_final else rows, begun)


def _through(config: TideConfig, version: str, period: tuple[float, float | None], after: float, life: EarlyLife,
             rows: Sequence[tuple[Any, ...]]) -> tuple[EarlyLife, Sequence[tuple[Any, ...]]]:
    """Go on through the shards of a period: rows closed later than `after`, the oldest first."""
    steps = baseline_steps(config.drift)
    wanted = _times(steps, TIMES[-1])
    begin_us, most = int(after * 1e6) + 1, MOST_ROWS
    while True:
        asked = {**wanted, "version": version, "begin": _EPOCH + timedelta(microseconds=begin_us), "workloads": life.waits_for,
                 "end": _end_of(life), "most": most}
        found = read(config, _KEEP, asked, since=period[0], until=period[1], version=version, tables={"kept": _table(rows)})
        until_us, rows = found[0][0], [tuple(row) for _, *row in found if row[1] is not None]
        if rows:
            life = _rates(config, rows, steps)
        if until_us is None or (life.is_final and until_us / 1e6 > _end_of(life)):
            return life, rows
        most = MOST_ROWS if until_us > begin_us else 2 * most              # that many rows of one instant
        begin_us = until_us


def _periods(begin: float, now: float) -> Iterator[tuple[float, float | None]]:
    """From `begin` to the end of the log: whole hours but for the first; the last one has no end."""
    hours = 1
    while now - begin > (hours + 1) * HOUR_S:
        end = begin // HOUR_S * HOUR_S + hours * HOUR_S
        yield begin, end
        begin, hours = end, min(2 * hours, MOST_HOURS)
    yield begin, None


def _rates(config: TideConfig, rows: Sequence[tuple[Any, ...]], steps: int) -> EarlyLife:
    """Of each scope, the fewest rows that settle it. Workloads are those that were served while everything together was not settled."""
    found: dict[str, Early] = {}
    for times in TIMES:
        is_open = ANY_WORKLOAD not in found or not found[ANY_WORKLOAD].is_complete
        for scope, *sums, until in read(config, _RATES, _times(steps, times), since=float("inf"), tables={"kept": _table(rows)}):
            if found[scope].is_complete if scope in found else not is_open:
                continue
            estimate = clustered(*sums)
            found[scope] = Early(estimate, until, is_settled(estimate, steps, times))
        if all(early.is_complete for early in found.values()):
            break
    return EarlyLife(found.pop(ANY_WORKLOAD, None), found)


def _times(steps: int, times: int) -> dict[str, Any]:
    return {"steps": times * steps, "requests": times * MIN_REQUESTS}


def _end_of(life: EarlyLife) -> float:
    return max((early.until for early in (life.overall, *(life.by_workload or {}).values()) if early is not None), default=0.0)


def _table(rows: Sequence[tuple[Any, ...]]) -> Any:
    columns = list(zip(*rows, strict=True)) or [()] * len(_KEPT)
    return pa.table([pa.array(values, kind) for values, kind in zip(columns, _KEPT.types, strict=True)], schema=_KEPT)
