"""When a drift is worth an adaptation: episodes, attempts, cool-down. Pure; knows neither Dagster nor Parquet.

An episode opens when a workload is judged drifted and closes when acceptance recovers or another draft version serves it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from tide_pipeline.config import DriftSettings
from tide_pipeline.contracts import DriftVerdict, from_dict

MOST_KEPT = 256                    # episodes; the cursor is stored with every tick, and tags of workloads come from clients
FORGET_S = 86_400.0                # after which an open episode of a workload without traffic is over
LEAD_S = 7.0                       # from a launch to the trainer's look at what was captured: Dagster's queue and two processes that start
LEAST = 0.75                       # of the signals must be there, however fast they come: rates are means, and traffic stops
UNSURE_S = 600.0                   # after which a fall that was certain, and is not any more, is forgotten


@dataclass(frozen=True, slots=True)
class Episode:
    """What is remembered of one workload between two looks. Times are Unix seconds."""

    number: int = 0
    attempts: int = 0
    since: float = 0.0             # windows from here on count as drifted traffic; 0 while no episode is open
    certain: float = 0.0           # when a verdict was last "drifted"
    draft_version: str = ""        # that was served when it opened
    last_run: float = 0.0          # when an adaptation of this workload was last seen queued or running
    seen: float = 0.0              # when the workload was last judged

    @property
    def is_open(self) -> bool:
        return self.since > 0


@dataclass(frozen=True)
class Memory:
    """The sensor's cursor."""

    looked_at: float = 0.0         # Unix seconds
    observed_at: float = 0.0
    episodes: dict[str, Episode] = field(default_factory=dict)
    lingered: int = 0              # ticks in a row that stayed to their end

    def to_cursor(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_cursor(cls, cursor: str | None) -> Memory:
        """Raises ValueError for text that no `to_cursor` wrote."""
        if not cursor:
            return cls()
        try:
            values = json.loads(cursor)
            episodes = {str(workload): from_dict(Episode, episode) for workload, episode in values["episodes"].items()}
            return cls(float(values["looked_at"]), float(values["observed_at"]), episodes, int(values.get("lingered", 0)))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no cursor of the drift sensor: {error!r}") from error


def follow(episode: Episode, verdict: DriftVerdict, now: float, settings: DriftSettings) -> Episode:
    """Open or close the episode by the verdict; too little data changes nothing.

    Once open it takes a recovery to close it, by the estimate: the worse a draft is, the less the speculation controller drafts, until the
    interval of a large drop may reach down to none. One that nothing was tried for is closed by UNSURE_S without a certain verdict, too.
    """
    if episode.is_open and verdict.draft_version != episode.draft_version:
        episode = dataclasses.replace(episode, since=0.0)
    stays = episode.is_open and is_falling(verdict, settings) and (episode.attempts > 0 or now - episode.certain < UNSURE_S)
    if not verdict.enough_data or stays:
        return episode
    if not verdict.drifted:
        return dataclasses.replace(episode, since=0.0)
    if episode.is_open:
        return dataclasses.replace(episode, certain=now)
    return dataclasses.replace(episode, number=episode.number + 1, attempts=0, since=now - settings.recent_s, certain=now,
                               draft_version=verdict.draft_version)


def why_wait(episode: Episode, now: float, settings: DriftSettings) -> str:
    """What keeps a drifted workload from being adapted to, whatever was collected of it; "" when nothing does."""
    if episode.attempts >= settings.max_attempts:
        return (f"drifted, but all {settings.max_attempts} attempts of episode {episode.number} are used: look at their runs, "
                "then launch adapt_draft by hand")
    cooling_s = episode.last_run + settings.cooldown_s - now
    if cooling_s > 0:
        return f"drifted, but the last adaptation was {now - episode.last_run:.0f} s ago: cooling down for another {cooling_s:.0f} s"
    return ""


def is_falling(verdict: DriftVerdict, settings: DriftSettings) -> bool:
    """By its estimate it is a drift; by its interval it is not one yet, or not any more."""
    return verdict.enough_data and not verdict.drifted and verdict.drop >= settings.min_drop


def enough_in_s(num_rows: int, rows_per_s: float, settings: DriftSettings) -> float:
    """Seconds until a training's signals are there, when they go on coming as they do; inf for never."""
    missing = settings.min_signal_rows - num_rows
    if missing <= 0:
        return 0.0
    return missing / rows_per_s if rows_per_s > 0 else math.inf


def is_close(verdict: DriftVerdict, settings: DriftSettings) -> bool:
    """Whether a few more requests may make a drift of it. Other policies than the interval's own decide by whole slots."""
    return settings.policy == "judge" and is_falling(verdict, settings) and verdict.drop_low > -settings.min_drop


def why_too_few(num_rows: int, rows_per_s: float, settings: DriftSettings) -> str:
    """What is missing of the signals that a training needs; "" when nothing will be by the time the trainer looks."""
    if num_rows < LEAST * settings.min_signal_rows or enough_in_s(num_rows, rows_per_s, settings) > LEAD_S:
        return f"drifted, but only {num_rows:,} of {settings.min_signal_rows:,} signal rows collected yet"
    return ""


def kept(episodes: Mapping[str, Episode], now: float, settings: DriftSettings) -> dict[str, Episode]:
    """Those worth remembering: open and seen in the last day, or cooling down. Of too many, those adapted to last, then seen last.

    What is forgotten of the others is their number, and that is in the tags of their runs.
    """
    def matters(episode: Episode) -> bool:
        return (episode.is_open and now - episode.seen < FORGET_S) or episode.last_run + settings.cooldown_s > now

    found = [(workload, episode) for workload, episode in episodes.items() if matters(episode)]
    return dict(sorted(found, key=lambda item: (-item[1].last_run, -item[1].seen))[:MOST_KEPT])


def run_key(verdict: DriftVerdict, episode: Episode) -> str:
    """Dagster takes a key once and never again, so every attempt has its own."""
    return f"{verdict.target}/{verdict.workload}/{episode.number}/{episode.attempts}"
