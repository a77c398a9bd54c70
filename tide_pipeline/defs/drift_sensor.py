"""Look, decide, get out: has acceptance fallen, is enough collected, has nobody begun? Then ask for one adaptation.

Knows where to look; drift/ judges, episodes.py decides.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence

import dagster as dg

from tide_pipeline.capture.control import MAX_WORKLOADS
from tide_pipeline.config import StackSettings, TideConfig
from tide_pipeline.contracts import DriftVerdict
from tide_pipeline.defs.budget import why_too_much
from tide_pipeline.defs.draft import AdaptConfig
from tide_pipeline.defs.episodes import Episode, Memory, follow, kept, run_key, why_too_few, why_wait
from tide_pipeline.defs.held import why_held
from tide_pipeline.defs.jobs import adapt_draft
from tide_pipeline.defs.lake import look
from tide_pipeline.defs.limits import runtime_tags
from tide_pipeline.defs.resources import TideResource
from tide_pipeline.defs.tags import ATTEMPT, BY_HAND, DRIFTED_AT, EPISODE, REASON, TARGET, WORKLOAD
from tide_pipeline.deployment.record import DeploymentRecord

OBSERVE_EVERY_S = 60.0             # observations stay in Dagster's event log for ever
MOST_TOLD = 16                     # workloads in a skip reason, which is stored with every tick
MOST_WINDOWS = 100_000             # counted through: two thirds of what capture/index.py remembers, so that a tick opens new shards alone
UNFINISHED = [dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED,
              dg.DagsterRunStatus.CANCELING]


@dg.sensor(name="drift_sensor", job=adapt_draft, minimum_interval_seconds=StackSettings().sensor_interval_s,
           default_status=dg.DefaultSensorStatus.RUNNING,
           description="Judges acceptance per workload; launches adapt_draft when it has fallen and enough signals are collected.")
def drift_sensor(context: dg.SensorEvaluationContext, tide: TideResource) -> dg.SensorResult:
    from tide_pipeline.drift.judge import judge_drift

    config, now = tide.settings(), time.time()
    memory = _remember(context)
    if 0 <= now - memory.looked_at < config.stack.sensor_interval_s:     # slower than the tick, which is fixed before settings are read
        return dg.SensorResult(skip_reason=f"looked less than {config.stack.sensor_interval_s} s ago", cursor=context.cursor)
    verdicts, too_many = busiest(judge_drift(config, now))
    running = adaptation_under_way(context.instance, config.target)
    episodes = memory.episodes | {v.workload: _episode(context.instance, memory, v, running, now, config) for v in verdicts}
    chosen, reason = choose(context.instance, config, verdicts, episodes, now) if running is None else (None, _busy(running))
    if chosen is not None and (too_much := why_too_much(context.instance, config, now)):
        reason = f"{chosen.workload}: drifted, but {too_much} ({chosen.reason})"
        chosen = None
    if chosen is not None:
        episode = episodes[chosen.workload]
        episodes[chosen.workload] = dataclasses.replace(episode, attempts=episode.attempts + 1, last_run=now)
    is_due = now - memory.observed_at >= OBSERVE_EVERY_S
    return dg.SensorResult(
        run_requests=[_request(config, chosen, episodes[chosen.workload])] if chosen else [],
        skip_reason=None if chosen else reason + too_many,
        cursor=Memory(now, now if is_due else memory.observed_at, kept(episodes, now, config.drift)).to_cursor(),
        asset_events=look(config) if is_due else [])


def busiest(verdicts: Sequence[DriftVerdict]) -> tuple[Sequence[DriftVerdict], str]:
    """The workloads with the most drafted steps, as many as capture follows; and what to say of the others, which any client can invent."""
    if len(verdicts) <= MAX_WORKLOADS:
        return verdicts, ""
    most = sorted(verdicts, key=lambda v: -v.num_steps)[:MAX_WORKLOADS]
    return most, f"; {len(verdicts) - MAX_WORKLOADS} more workload tags with less traffic left out: are they workloads, or requests?"


def choose(instance: dg.DagsterInstance, config: TideConfig, verdicts: Sequence[DriftVerdict], episodes: Mapping[str, Episode],
           now: float) -> tuple[DriftVerdict | None, str]:
    """The workload to adapt to now (the surest, largest drop first), or why there is none. What costs most is asked last."""
    ranked = sorted(verdicts, key=lambda v: -v.drop_low)
    waits = {v.workload: why_wait(episodes[v.workload], now, config.drift) for v in ranked if v.drifted}
    if left := [v for v in ranked if waits.get(v.workload) == ""]:
        latest = DeploymentRecord(config.state.deployments, config.target).latest()
        waits |= {v.workload: why_held(instance, config, latest, v.workload, episodes[v.workload].since) for v in left}
    left = [v for v in left if not waits[v.workload]]
    rows = _rows(config, {v.workload: episodes[v.workload].since for v in left})
    served: dict[str, float] | None = None                               # read once, and only when something may be begun
    for verdict in left:
        wait = why_too_few(rows[verdict.workload], config.drift)
        if not wait:
            served = served if served is not None else _served(config, now)
            wait = _why_not_worth(config, verdict, served)
        if not wait:
            return verdict, ""
        waits[verdict.workload] = wait
    return None, _told(ranked, waits) or f"no request of {config.target} was answered lately: nothing to judge"


def _told(ranked: Sequence[DriftVerdict], waits: Mapping[str, str]) -> str:
    told = [f"{v.workload}: {waits[v.workload]} ({v.reason})" if v.drifted else f"{v.workload}: {v.reason}" for v in ranked[:MOST_TOLD]]
    return "; ".join([*told, f"and {len(ranked) - MOST_TOLD} more that fell less"] if len(ranked) > MOST_TOLD else told)


def _rows(config: TideConfig, since: Mapping[str, float]) -> dict[str, int]:
    """Captured rows of each workload, counted no further than a training needs, or than it looks."""
    from tide_pipeline.capture.reader import count_rows_each
    from tide_pipeline.training.data import LOOK_THROUGH

    among = min(LOOK_THROUGH * config.training.max_windows, MOST_WINDOWS)
    return count_rows_each(config.state.signals, config.target, since, enough=config.drift.min_signal_rows, among=among)


def _served(config: TideConfig, now: float) -> dict[str, float]:
    """Tokens per second of each workload, over as long as drift may look back."""
    from tide_pipeline.drift.acceptance import REACH
    from tide_pipeline.drift.series import live

    rates: dict[str, float] = {}
    for bucket in live(config, REACH * config.drift.recent_s, now).workloads:
        rates[bucket.workload] = rates.get(bucket.workload, 0.0) + bucket.tokens_per_s
    return rates


def _why_not_worth(config: TideConfig, verdict: DriftVerdict, served: Mapping[str, float]) -> str:
    from tide_pipeline.drift.worth import Price, worth

    found = worth(rate=verdict.first_position_rate, drop=verdict.drop, tokens_per_s=served.get(verdict.workload, 0.0),
                  all_tokens_per_s=sum(served.values()), price=Price.of(config))
    return "" if found.is_worth else f"drifted, but {found.reason}"


def adaptation_under_way(instance: dg.DagsterInstance, target: str) -> dg.DagsterRun | None:
    """A queued or running adapt_draft of this target; one launched by hand may not name its target."""
    runs = instance.get_runs(dg.RunsFilter(job_name=adapt_draft.name, statuses=UNFINISHED))
    return next((run for run in runs if run.tags.get(TARGET, target) == target), None)


def last_episode(instance: dg.DagsterInstance, target: str, workload: str) -> int:
    """The highest number that names a run; 0 when none does. A run's key is taken once, so numbers never start again."""
    runs = instance.get_runs(dg.RunsFilter(job_name=adapt_draft.name, tags={TARGET: target, WORKLOAD: workload}), limit=50)
    return max((int(run.tags.get(EPISODE, "0")) for run in runs), default=0)


def _remember(context: dg.SensorEvaluationContext) -> Memory:
    try:
        return Memory.from_cursor(context.cursor)
    except ValueError as error:
        context.log.warning(f"starting from an empty memory: {error}")
        return Memory()


def _episode(instance: dg.DagsterInstance, memory: Memory, verdict: DriftVerdict, running: dg.DagsterRun | None, now: float,
             config: TideConfig) -> Episode:
    before = memory.episodes.get(verdict.workload, Episode())
    episode = dataclasses.replace(follow(before, verdict, now, config.drift), seen=now)
    if episode.is_open and before.number == 0:                           # never seen, or forgotten
        episode = dataclasses.replace(episode, number=1 + last_episode(instance, config.target, verdict.workload))
    is_mine = running is not None and running.tags.get(WORKLOAD, verdict.workload) == verdict.workload
    return dataclasses.replace(episode, last_run=now) if is_mine else episode


def _busy(running: dg.DagsterRun) -> str:
    return f"run {running.run_id[:8]} is {running.status.value.lower()}: {running.tags.get(REASON, BY_HAND)}"


def _request(config: TideConfig, verdict: DriftVerdict, episode: Episode) -> dg.RunRequest:
    drifted_at = episode.since + config.drift.recent_s
    asked = AdaptConfig(workload=verdict.workload, reason=verdict.reason, focus_since=episode.since, drifted_at=drifted_at)
    return dg.RunRequest(
        run_key=run_key(verdict, episode), run_config=dg.RunConfig(ops={"draft_checkpoint": asked}),
        tags={TARGET: config.target, WORKLOAD: verdict.workload, REASON: verdict.reason, EPISODE: str(episode.number),
              DRIFTED_AT: f"{drifted_at:.1f}", ATTEMPT: str(episode.attempts), **runtime_tags(config)})
