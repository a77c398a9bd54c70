"""Look, decide, get out: has acceptance fallen, is enough collected, has nobody begun? Then ask for one adaptation.

Knows where to look; drift/ judges, episodes.py decides. A look that is nearly sure is followed by others in the same tick (linger.py).
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import dagster as dg

from tide_pipeline.capture.control import MAX_WORKLOADS
from tide_pipeline.config import StackSettings, TideConfig
from tide_pipeline.contracts import DriftVerdict
from tide_pipeline.defs.budget import why_too_much
from tide_pipeline.defs.draft import AdaptConfig
from tide_pipeline.defs.episodes import (
    Episode,
    Memory,
    enough_in_s,
    follow,
    is_close,
    kept,
    run_key,
    why_too_few,
    why_wait,
)
from tide_pipeline.defs.held import why_held
from tide_pipeline.defs.jobs import adapt_draft
from tide_pipeline.defs.lake import look
from tide_pipeline.defs.limits import runtime_tags
from tide_pipeline.defs.linger import linger
from tide_pipeline.defs.resources import TideResource
from tide_pipeline.defs.tags import ATTEMPT, BY_HAND, DRIFTED_AT, EPISODE, REASON, TARGET, WORKLOAD
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.errors import LakeAway

OBSERVE_EVERY_S = 60.0             # observations stay in Dagster's event log for ever
MOST_LINGERED = 3                  # ticks in a row for a verdict: what stays unsure for longer is no fall that has just begun
SOON_S = 30.0                      # signals that are missing may be there sooner than that, should traffic grow
VERDICT, SIGNALS = "verdict", "signals"
MOST_TOLD = 16                     # workloads in a skip reason, which is stored with every tick
MOST_WINDOWS = 100_000             # counted through: two thirds of what capture/index.py remembers, so that a tick opens new shards alone
UNFINISHED = [dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED,
              dg.DagsterRunStatus.CANCELING]


@dataclass(frozen=True)
class Choice:
    """The workload to adapt to now, or why there is none."""

    verdict: DriftVerdict | None
    why_none: str = ""
    near: str = ""                 # VERDICT or SIGNALS: what is missing and may be there in seconds


@dataclass(frozen=True)
class Seen:
    """By one look."""

    at: float                      # Unix seconds
    episodes: Mapping[str, Episode]
    choice: Choice
    left_out: str = ""             # what to say of workloads that were not judged


@dg.sensor(name="drift_sensor", job=adapt_draft, minimum_interval_seconds=StackSettings().sensor_interval_s,
           default_status=dg.DefaultSensorStatus.RUNNING,
           description="Judges acceptance per workload; launches adapt_draft when it has fallen and enough signals are collected.")
def drift_sensor(context: dg.SensorEvaluationContext, tide: TideResource) -> dg.SensorResult:
    try:
        return look_and_ask(context, tide.settings())
    except LakeAway as error:
        return dg.SensorResult(skip_reason=f"the lake is away, nothing was judged: {error}", cursor=context.cursor)


def look_and_ask(context: dg.SensorEvaluationContext, config: TideConfig) -> dg.SensorResult:
    """One tick. Raises LakeAway."""
    began, memory = time.time(), _remember(context)
    if 0 <= began - memory.looked_at < config.stack.sensor_interval_s:   # slower than the tick, which is fixed before settings are read
        return dg.SensorResult(skip_reason=f"looked less than {config.stack.sensor_interval_s} s ago", cursor=context.cursor)
    episodes = dict(memory.episodes)

    def look_once() -> Seen:
        seen = see(context.instance, config, episodes)
        episodes.update(seen.episodes)
        return seen

    worth_it = (SIGNALS, VERDICT) if memory.lingered < MOST_LINGERED else (SIGNALS,)
    seen = linger(look_once, lambda seen: seen.choice.near in worth_it, lambda: _newest_shards(config, began), config.drift.linger_s)
    chosen = seen.choice.verdict
    if chosen is not None:
        episode = episodes[chosen.workload]
        episodes[chosen.workload] = dataclasses.replace(episode, attempts=episode.attempts + 1, last_run=seen.at)
    is_due = began - memory.observed_at >= OBSERVE_EVERY_S
    return dg.SensorResult(
        run_requests=[_request(config, chosen, episodes[chosen.workload], seen.at)] if chosen else [],
        skip_reason=None if chosen else seen.choice.why_none + seen.left_out,
        cursor=Memory(began, began if is_due else memory.observed_at, kept(episodes, seen.at, config.drift),
                      min(memory.lingered + 1, MOST_LINGERED) if seen.choice.near == VERDICT else 0).to_cursor(),
        asset_events=look(config) if is_due else [])


def see(instance: dg.DagsterInstance, config: TideConfig, episodes: Mapping[str, Episode]) -> Seen:
    """Judge every workload and choose one. Reads the log, runs and the deployment record; changes nothing."""
    from tide_pipeline.drift.judge import judge_drift

    now = time.time()
    verdicts, left_out = busiest(judge_drift(config, now))
    running = adaptation_under_way(instance, config.target)
    episodes = {**episodes} | {v.workload: _episode(instance, episodes, v, running, now, config) for v in verdicts}
    choice = choose(instance, config, verdicts, episodes, now) if running is None else Choice(None, _busy(running))
    if choice.verdict is not None and (too_much := why_too_much(instance, config, now)):
        choice = Choice(None, f"{choice.verdict.workload}: drifted, but {too_much} ({choice.verdict.reason})")
    return Seen(now, episodes, choice, left_out)


def busiest(verdicts: Sequence[DriftVerdict]) -> tuple[Sequence[DriftVerdict], str]:
    """The workloads with the most drafted steps, as many as capture follows; and what to say of the others, which any client can invent."""
    if len(verdicts) <= MAX_WORKLOADS:
        return verdicts, ""
    most = sorted(verdicts, key=lambda v: -v.num_steps)[:MAX_WORKLOADS]
    return most, f"; {len(verdicts) - MAX_WORKLOADS} more workload tags with less traffic left out: are they workloads, or requests?"


def choose(instance: dg.DagsterInstance, config: TideConfig, verdicts: Sequence[DriftVerdict], episodes: Mapping[str, Episode],
           now: float) -> Choice:
    """The workload with the surest, largest drop first. What costs most is asked last."""
    ranked = sorted(verdicts, key=lambda v: -v.drop_low)
    waits = {v.workload: why_wait(episodes[v.workload], now, config.drift) for v in ranked
             if v.enough_data and episodes[v.workload].is_open}
    if left := [v for v in ranked if waits.get(v.workload) == ""]:
        latest = DeploymentRecord(config.state.deployments, config.target).latest()
        waits |= {v.workload: why_held(instance, config, latest, v.workload, episodes[v.workload].since) for v in left}
    left = [v for v in left if not waits[v.workload]]
    near = VERDICT if any(is_close(v, config.drift) and not episodes[v.workload].is_open
                          and not why_wait(episodes[v.workload], now, config.drift) for v in ranked) else ""
    collected = _collected(config, {v.workload: episodes[v.workload].since for v in left}, now)
    served: dict[str, float] | None = None                               # read once, and only when something may be begun
    for verdict in left:
        wait = why_too_few(*collected[verdict.workload], config.drift)
        if wait and enough_in_s(*collected[verdict.workload], config.drift) <= SOON_S:
            near = SIGNALS
        if not wait:
            served = served if served is not None else _served(config, now)
            wait = _why_not_worth(config, verdict, served)
        if not wait:
            return Choice(verdict)
        waits[verdict.workload] = wait
    return Choice(None, _told(ranked, waits) or f"no request of {config.target} was answered lately: nothing to judge", near)


def _told(ranked: Sequence[DriftVerdict], waits: Mapping[str, str]) -> str:
    told = [f"{v.workload}: {waits[v.workload]} ({v.reason})" if v.workload in waits else f"{v.workload}: {v.reason}"
            for v in ranked[:MOST_TOLD]]
    return "; ".join([*told, f"and {len(ranked) - MOST_TOLD} more that fell less"] if len(ranked) > MOST_TOLD else told)


def _collected(config: TideConfig, since: Mapping[str, float], now: float) -> dict[str, tuple[int, float]]:
    """Captured rows of each workload, and how many a second came lately where they are not enough yet."""
    rows = _rows(config, since)
    lately = {workload: max(since[workload], now - max(5.0, 3 * config.capture.flush_s))       # writers hold some of the newest
              for workload, count in rows.items() if count < config.drift.min_signal_rows}
    per_s = {workload: count / (now - lately[workload]) for workload, count in _rows(config, lately).items()}
    return {workload: (count, per_s.get(workload, 0.0)) for workload, count in rows.items()}


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


def _episode(instance: dg.DagsterInstance, episodes: Mapping[str, Episode], verdict: DriftVerdict, running: dg.DagsterRun | None,
             now: float, config: TideConfig) -> Episode:
    before = episodes.get(verdict.workload, Episode())
    episode = dataclasses.replace(follow(before, verdict, now, config.drift), seen=now)
    if episode.is_open and before.number == 0:                           # never seen, or forgotten
        episode = dataclasses.replace(episode, number=1 + last_episode(instance, config.target, verdict.workload))
    is_mine = running is not None and running.tags.get(WORKLOAD, verdict.workload) == verdict.workload
    return dataclasses.replace(episode, last_run=now) if is_mine else episode


def _busy(running: dg.DagsterRun) -> str:
    return f"run {running.run_id[:8]} is {running.status.value.lower()}: {running.tags.get(REASON, BY_HAND)}"


def _newest_shards(config: TideConfig, now: float) -> list[object]:
    """Of both datasets: others, once a writer has flushed."""
    from tide_pipeline.capture.layout import live_shards

    roots = config.state.acceptance, config.state.signals
    return [live_shards(root, config.target, now - config.drift.recent_s)[-1:] for root in roots]


def _request(config: TideConfig, verdict: DriftVerdict, episode: Episode, now: float) -> dg.RunRequest:
    drifted_at = episode.since + config.drift.recent_s
    reason = verdict.reason if verdict.drifted else f"{verdict.reason}; it was certain {now - drifted_at:.0f} s ago, and has not recovered"
    asked = AdaptConfig(workload=verdict.workload, reason=reason, focus_since=episode.since, drifted_at=drifted_at)
    return dg.RunRequest(
        run_key=run_key(verdict, episode), run_config=dg.RunConfig(ops={"draft_checkpoint": asked}),
        tags={TARGET: config.target, WORKLOAD: verdict.workload, REASON: reason, EPISODE: str(episode.number),
              DRIFTED_AT: f"{drifted_at:.1f}", ATTEMPT: str(episode.attempts), **runtime_tags(config)})
