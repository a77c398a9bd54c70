"""First-position acceptance of recent traffic, added up in SQL. Knows the log; decides nothing.

Counted are steps that drafted at all, probes included: the speculation controller can't move their acceptance, only their number.
Recent are the last `recent_s` seconds; where the controller drafted too little in them, as far back as `min_steps` drafted steps reach,
but not further than REACH windows, nor into the early life (early.py). In SLICES of time, weighted by traffic (rates.py).

Times are compared as they stand in the log before anything is computed from them, so that DuckDB skips row groups by their statistics.
"""

from __future__ import annotations

from collections.abc import Mapping

from tide_pipeline.config import TideConfig
from tide_pipeline.drift.rates import RateEstimate, clustered
from tide_pipeline.drift.views import read

SLICES = 4
MIN_REQUESTS = 8                   # fewer clusters have no variance worth the name
REACH = 10                         # windows that recent traffic may be gathered from

_NEWEST = """
select workload, arg_max(draft_version, time) from acceptance
where draft_version <> '' and time >= to_timestamp(floor($since)) and epoch(time) > $since and epoch(time) <= $now
group by workload order by workload
"""
# From `chosen` (scope, slice, request, traffic n, drafted d, accepted a, time t) to what rates.clustered takes.
FINISH = """
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
         where time >= to_timestamp(floor($now - $reach_s)) and time <= to_timestamp(ceil($now))
           and epoch(time) > greatest(after, $now - $reach_s) and epoch(time) <= $now),
counted as (select *, sum(d) over (partition by scope order by t desc, request_id rows unbounded preceding) - d as newer
            from life),
begins as (select scope, least($now - $recent_s, min(t) filter (newer < $min_steps)) as begin from counted group by scope),
chosen as (select life.*, least($slices - 1, floor((t - begin) / ($now - begin) * $slices)) as slice
           from life join begins using (scope) where t >= begin), {FINISH}"""  # noqa: S608 - values are bound


def newest_versions(config: TideConfig, now: float) -> dict[str, str]:
    """Workload tags with drafted-for traffic in the last `recent_s` seconds, and the draft version of the newest row of each."""
    since = now - config.drift.recent_s
    rows = read(config, _NEWEST, {"since": since, "now": now}, since=since)
    return {str(workload): str(version) for workload, version in rows}


def recent(config: TideConfig, now: float, versions: Mapping[str, str], after: Mapping[str, float]) -> dict[str, RateEstimate]:
    """Recent rates of workloads -> draft version; only rows closed later than `after[workload]` count."""
    s = config.drift
    found = _recent(config, now, versions, after, s.recent_s + 1)
    thin = {workload: version for workload, version in versions.items() if workload not in found or found[workload].steps < s.min_steps}
    return found | (_recent(config, now, thin, after, REACH * s.recent_s) if thin else {})


def _recent(config: TideConfig, now: float, versions: Mapping[str, str], after: Mapping[str, float],
            reach_s: float) -> dict[str, RateEstimate]:
    s = config.drift
    rows = read(config, _RECENT, {
        "workloads": list(versions), "versions": list(versions.values()), "after": [after.get(w, 0.0) for w in versions], "now": now,
        "reach_s": reach_s, "recent_s": s.recent_s, "min_steps": s.min_steps, "slices": SLICES}, since=now - reach_s)
    return {scope: clustered(*sums) for scope, *sums, _ in rows}
