"""First-position acceptance of recent and of early traffic, added up in SQL. Knows the log; decides nothing.

Counted are steps that drafted at all, probes included: the speculation controller can't move their acceptance, only their number.
    early life   the first N drafted steps of a draft version (of MIN_REQUESTS requests or more): what it was worth when it was
                 promoted. Fixed once it is complete.
    recent       the last `recent_s` seconds; where the controller drafted too little in them, as far back as `min_steps` drafted steps
                 reach, but not further than REACH windows, nor into the early life. In SLICES of time, weighted by traffic (rates.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tide_pipeline.config import DriftSettings, TideConfig
from tide_pipeline.contracts import ANY_WORKLOAD
from tide_pipeline.drift.rates import RateEstimate, clustered
from tide_pipeline.drift.views import read

SLICES = 4
MIN_REQUESTS = 8                   # fewer clusters have no variance worth the name
REACH = 10                         # windows that recent traffic may be gathered from

_NEWEST = """
select workload, arg_max(draft_version, time) from acceptance
where draft_version <> '' and epoch(time) > $since and epoch(time) <= $now group by workload order by workload
"""
# From `chosen` (scope, slice, request, traffic n, drafted d, accepted a, time t) to what rates.clustered takes.
_FINISH = """
requests as (select scope, slice, request_id, sum(n) as n, sum(d) as d, sum(a) as a, max(t) as t from chosen group by all),
slices as (select scope, slice, sum(n) as n, sum(d) as d, sum(a) as a, max(t) as t from requests group by all having sum(d) > 0),
weighted as (select *, n / sum(n) over (partition by scope) as w, a / d as r, (a + 1) / (d + 2) as p from slices),
parts as (select r.scope, request_id, sum(w.w * (r.a - w.r * r.d) / w.d) as u
          from requests r join weighted w using (scope, slice) group by all having sum(r.d) > 0),
clusters as (select scope, count(*) as requests, sum(u * u) as squares from parts group by scope)
select w.scope, sum(w * r), sum(d)::bigint, any_value(requests), count(*), any_value(squares), sum(w * w * p * (1 - p) / d), max(t)
from weighted w join clusters using (scope) group by w.scope
"""
_RECENT = f"""
with serving as (select unnest($workloads) as workload, unnest($versions) as draft_version, unnest($after) as after),
life as (select workload as scope, request_id, epoch(time) as t, num_steps as n, coalesce(drafted[1], 0) as d, coalesce(accepted[1], 0) as a
         from acceptance join serving using (workload, draft_version)
         where epoch(time) > greatest(after, $now - $reach_s) and epoch(time) <= $now),
counted as (select *, sum(d) over (partition by scope order by t desc, request_id rows unbounded preceding) - d as newer
            from life),
begins as (select scope, least($now - $recent_s, min(t) filter (newer < $min_steps)) as begin from counted group by scope),
chosen as (select life.*, least($slices - 1, floor((t - begin) / ($now - begin) * $slices)) as slice
           from life join begins using (scope) where t >= begin), {_FINISH}"""  # noqa: S608 - values are bound
_EARLY = f"""
with rows as (select workload, request_id, epoch(time) as t, num_steps as n, drafted[1] as d, accepted[1] as a
              from acceptance where draft_version = $version and draft_length > 0),
life as (select '{ANY_WORKLOAD}' as scope, * from rows union all select workload as scope, * from rows),
marked as (select *, (row_number() over (partition by scope, request_id order by t) = 1)::int as opens from life),
counted as (select *, sum(d) over older - d as steps_before, sum(opens) over older - opens as requests_before
            from marked window older as (partition by scope order by t, request_id rows unbounded preceding)),
early as (select *, 0 as slice from counted where steps_before < $steps or requests_before < $requests),
chosen as (select * from early where scope = '{ANY_WORKLOAD}' or scope in (select workload from early where scope = '{ANY_WORKLOAD}')),
{_FINISH}"""  # noqa: S608


@dataclass(frozen=True, slots=True)
class Early:
    """Early life of a draft on one workload, or of all it served then."""

    estimate: RateEstimate
    until: float                   # Unix seconds of its last row
    is_complete: bool


@dataclass(frozen=True, slots=True)
class EarlyLife:
    """Of one draft version. A workload that was not served then has no entry of its own."""

    overall: Early | None = None
    by_workload: Mapping[str, Early] | None = None

    def of(self, workload: str) -> Early | None:
        """What `workload` is compared with: its own early life, or that of everything where it came later."""
        return (self.by_workload or {}).get(workload, self.overall)

    @property
    def is_final(self) -> bool:
        """Nothing that is logged later changes it."""
        everyone = [self.overall, *(self.by_workload or {}).values()]
        return all(early is not None and early.is_complete for early in everyone)


def baseline_steps(settings: DriftSettings) -> int:
    """N: drafted steps that make an early life complete."""
    return max(2 * settings.min_steps, 400)


def newest_versions(config: TideConfig, now: float) -> dict[str, str]:
    """Workload tags with drafted-for traffic in the last `recent_s` seconds, and the draft version of the newest row of each."""
    since = now - config.drift.recent_s
    rows = read(config, _NEWEST, {"since": since, "now": now}, since=since)
    return {str(workload): str(version) for workload, version in rows}


def recent(config: TideConfig, now: float, versions: Mapping[str, str], after: Mapping[str, float]) -> dict[str, RateEstimate]:
    """Recent rates of workloads -> draft version; only rows closed later than `after[workload]` count."""
    s = config.drift
    reach_s = REACH * s.recent_s
    rows = read(config, _RECENT, {
        "workloads": list(versions), "versions": list(versions.values()), "after": [after.get(w, 0.0) for w in versions], "now": now,
        "reach_s": reach_s, "recent_s": s.recent_s, "min_steps": s.min_steps, "slices": SLICES}, since=now - reach_s)
    return {scope: clustered(*sums) for scope, *sums, _ in rows}


def early_life(config: TideConfig, version: str, since: float | None) -> EarlyLife:
    """Of a draft version that served from `since` (Unix seconds) on."""
    wanted = baseline_steps(config.drift)
    rows = read(config, _EARLY, {"version": version, "steps": wanted, "requests": MIN_REQUESTS}, since=since)
    found = {scope: Early(estimate := clustered(*sums), until, estimate.steps >= wanted and estimate.requests >= MIN_REQUESTS)
             for scope, *sums, until in rows}
    return EarlyLife(found.pop(ANY_WORKLOAD, None), found)
