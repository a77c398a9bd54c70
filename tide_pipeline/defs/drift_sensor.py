"""Look, decide, get out: has acceptance fallen, is enough collected, has nobody begun? Then ask for one adaptation.

Knows where to look; drift/ judges, episodes.py decides.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence

import dagster as dg

from tide_pipeline.config import StackSettings, TideConfig
from tide_pipeline.contracts import DriftVerdict
from tide_pipeline.defs.budget import why_too_much
from tide_pipeline.defs.draft import AdaptConfig
from tide_pipeline.defs.episodes import Episode, Memory, follow, run_key, why_wait
from tide_pipeline.defs.jobs import adapt_draft
from tide_pipeline.defs.lake import look
from tide_pipeline.defs.resources import TideResource
from tide_pipeline.defs.tags import ATTEMPT, BY_HAND, DRIFTED_AT, EPISODE, MAX_RUNTIME, REASON, TARGET, WORKLOAD

OBSERVE_EVERY_S = 60.0             # observations stay in Dagster's event log for ever
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
    verdicts = judge_drift(config, now)
    running = adaptation_under_way(context.instance, config.target)
    episodes = memory.episodes | {v.workload: _episode(context.instance, memory, v, running, now, config) for v in verdicts}
    chosen, reason = choose(config, verdicts, episodes, now) if running is None else (None, _busy(running))
    if chosen is not None and (too_much := why_too_much(context.instance, config, now)):
        reason = f"{chosen.workload}: drifted, but {too_much} ({chosen.reason})"
        chosen = None
    if chosen is not None:
        episode = episodes[chosen.workload]
        episodes[chosen.workload] = dataclasses.replace(episode, attempts=episode.attempts + 1, last_run=now)
    is_due = now - memory.observed_at >= OBSERVE_EVERY_S
    return dg.SensorResult(
        run_requests=[_request(config, chosen, episodes[chosen.workload])] if chosen else [],
        skip_reason=None if chosen else reason,
        cursor=Memory(now, now if is_due else memory.observed_at, episodes).to_cursor(),
        asset_events=look(config) if is_due else [])


def choose(config: TideConfig, verdicts: Sequence[DriftVerdict], episodes: Mapping[str, Episode],
           now: float) -> tuple[DriftVerdict | None, str]:
    """The workload to adapt to now (the surest, largest drop first), or why there is none."""
    from tide_pipeline.capture.reader import count_rows

    served: dict[str, float] | None = None                               # read once, and only when something may be begun
    waiting = []
    for verdict in sorted(verdicts, key=lambda v: -v.drop_low):
        episode = episodes[verdict.workload]
        if not verdict.drifted:
            waiting.append(f"{verdict.workload}: {verdict.reason}")
            continue
        rows = count_rows(config.state.signals, config.target, workloads={verdict.workload}, since=episode.since)
        wait = why_wait(episode, rows, now, config.drift)
        if not wait:
            served = served if served is not None else _served(config, now)
            wait = _why_not_worth(config, verdict, served)
        if not wait:
            return verdict, ""
        waiting.append(f"{verdict.workload}: {wait} ({verdict.reason})")
    return None, "; ".join(waiting) or f"no request of {config.target} was answered lately: nothing to judge"


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
    """The highest number given out before the cursor was lost; 0 when there was none. Numbers name runs, so they never start again."""
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
    before = memory.episodes.get(verdict.workload) or Episode(number=last_episode(instance, config.target, verdict.workload))
    episode = follow(before, verdict, now, config.drift)
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
              DRIFTED_AT: f"{drifted_at:.1f}", ATTEMPT: str(episode.attempts),
              MAX_RUNTIME: str(int(600 + 4 * config.training.time_budget_s))})
