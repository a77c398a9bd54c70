"""Each hour of the lake as a partition that people click on: its rows, bytes and acceptance. Knows how to look; lake.py knows the assets.

A sensor reports the hours as they fill; `observe_lake` with hours chosen does it for earlier ones. Only news are reported, so that
"last materialized" is when the engine last wrote, which is what the freshness policies go by.
"""

import json
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import dagster as dg

from tide_pipeline.config import TideConfig
from tide_pipeline.defs.keys import key_of
from tide_pipeline.defs.lake import HOUR_S
from tide_pipeline.defs.resources import TideResource

if TYPE_CHECKING:
    from tide_pipeline.capture.store import Root

EVERY_S = 300
LATE_S = 600.0                     # a row may be written so long after its hour is over
MOST = 3                           # hours looked at in one tick

Seen = dict[str, dict[str, int]]   # hour -> asset -> requests or rows, as last reported
Facts = dict[str, float | str]


@dg.sensor(name="lake_sensor", minimum_interval_seconds=EVERY_S, default_status=dg.DefaultSensorStatus.RUNNING,
           description="Reports what the engine wrote to the lake, as partitions of acceptance_log and signal_windows, hour by hour.")
def lake_sensor(context: dg.SensorEvaluationContext, tide: TideResource) -> dg.SensorResult:
    config, seen = tide.settings(), _remembered(context)
    now_seen: Seen = {}
    news = []
    for hour in due(seen, time.time()):
        events = look_at_hour(config, hour)
        now_seen[hour] = {event.asset_key.path[-1]: count_of(event) for event in events}
        news += [event for event in events if count_of(event) != seen.get(hour, {}).get(event.asset_key.path[-1], 0)]
    told = "; ".join(f"{hour}: {', '.join(f'{name} {count:,}' for name, count in counts.items()) or 'nothing written'}"
                     for hour, counts in now_seen.items())
    return dg.SensorResult(asset_events=news, cursor=json.dumps(now_seen),
                           skip_reason=f"{told} ({len(news)} of it new: reported)" if news else f"{told} (nothing new)")


def due(seen: Seen, now: float) -> list[str]:
    """Hours to look at now: from the last one looked at, or the one that may still be written to, to this one; the first few of many."""
    hours = [min(hour_of(now - LATE_S), max(seen, default=hour_of(now)))]
    while hours[-1] < hour_of(now):
        hours.append(hour_of(begins(hours[-1]) + HOUR_S))
    return hours[:MOST]


def look_at_hour(config: TideConfig, hour: str) -> list[dg.AssetMaterialization]:
    """What the engine wrote of an hour, as one event of each asset; none of an asset that has nothing of it. Raises LakeError."""
    from tide_pipeline.capture.layout import live_shards
    from tide_pipeline.capture.reader import count_rows
    from tide_pipeline.drift.series import acceptance_series

    begin, state = begins(hour), config.state
    end = begin + HOUR_S
    found: list[tuple[str, Root, Facts]] = []
    buckets = acceptance_series(config, begin, HOUR_S, end)
    if requests := sum(bucket.requests for bucket in buckets):
        drafted = [b for b in buckets if b.first_position_rate is not None and b.acceptance_length is not None]
        steps = sum(b.drafted_steps for b in drafted)
        rates = {"acceptance_length": sum((b.acceptance_length or 0.0) * b.drafted_steps for b in drafted) / steps,
                 "first_position_rate": sum((b.first_position_rate or 0.0) * b.drafted_steps for b in drafted) / steps} if steps else {}
        tokens = sum(b.tokens_per_s * b.seconds for b in buckets)
        found.append(("acceptance_log", state.acceptance, {"requests": requests, "tokens": round(tokens), **rates,
                                                           "workloads": ", ".join(sorted({b.workload for b in buckets}))}))
    if rows := count_rows(state.signals, config.target, since=begin, until=end):
        found.append(("signal_windows", state.signals, {"rows": rows}))
    return [dg.AssetMaterialization(key_of(name), partition=hour, metadata={
        **facts, "bytes": sum(shard.size for shard in live_shards(root, config.target, begin, end))}) for name, root, facts in found]


def count_of(event: dg.AssetMaterialization) -> int:
    """What tells whether there are news: bytes change when shards are put together."""
    counted = event.metadata.get("requests") or event.metadata["rows"]
    return int(str(counted.value))


def hour_of(at: float) -> str:
    """The partition key of a moment; sorts as time does."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d-%H:00")


def begins(hour: str) -> float:
    """Unix seconds."""
    return datetime.strptime(hour, "%Y-%m-%d-%H:%M").replace(tzinfo=UTC).timestamp()


def _remembered(context: dg.SensorEvaluationContext) -> Seen:
    try:
        found = json.loads(context.cursor or "{}")
        return {str(hour): {str(name): int(count) for name, count in counts.items()} for hour, counts in found.items() if begins(hour)}
    except (ValueError, TypeError, AttributeError) as error:
        context.log.warning(f"starting from this hour, the cursor is not ours: {error}")
        return {}
