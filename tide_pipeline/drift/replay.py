"""Recorded or made-up slots of traffic through a policy: when it would have fired. Pure but for `recorded`, which asks the log.

Of each workload and draft version a policy of its own, on what the draft was worth at promotion where that is known, else on what its first
slots say. Where it fires, a draft adapted to that traffic is imagined `lead_s` later: the policy begins anew there, as it would on the new
draft. The log goes on as it was, with the acceptance of the draft that really served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from tide_pipeline.config import TideConfig
from tide_pipeline.drift.early import LATE_S
from tide_pipeline.drift.rates import RateEstimate
from tide_pipeline.drift.slots import Slot, Sums
from tide_pipeline.drift.views import read

CHUNK_S = 6 * 3600.0               # of the log, in memory at a time
BEGINNING = 400                    # drafted steps that a firing is compared with

Key = tuple[str, str]              # workload, draft version

_SLOTS = """
with requests as (
    select workload, draft_version, request_id, max(epoch(time)) as t, sum(coalesce(drafted[1], 0)) as d,
           sum(coalesce(accepted[1], 0)) as a, sum(num_steps) as n, sum(emitted_tokens) as tokens
    from acceptance where time > $since and time <= $until group by all having max(finish_reason) <> '')
select (floor(t / $slot_s) + 1) * $slot_s as slot, workload, draft_version, count(*) filter (d > 0), sum(d)::bigint, sum(a)::bigint,
       sum(d * d)::double, sum(d * a)::double, sum(a * a)::double, sum(tokens)::bigint, sum(n)::bigint
from requests where draft_version <> '' group by slot, workload, draft_version order by slot, workload, draft_version
"""


@dataclass(frozen=True, slots=True)
class Firing:
    """A policy said: adapt now."""

    time: float
    workload: str
    draft_version: str
    rate: float                    # first-position acceptance since the last quiet slots, as the policy had it to judge
    before: float                  # and at the beginning of the draft

    @property
    def drop(self) -> float:
        return self.before - self.rate


def recorded(config: TideConfig, since: float, until: float, slot_s: float) -> Iterator[tuple[Key, Slot]]:
    """Slots of the log in order of time; a request's steps count where it ended, and not before it has. Raises LakeError."""
    from datetime import UTC, datetime

    begin = since
    while begin < until:
        end = min(begin + CHUNK_S, until)
        bounds = {"since": datetime.fromtimestamp(begin, UTC), "until": datetime.fromtimestamp(end, UTC), "slot_s": float(slot_s)}
        for at, workload, version, *sums in read(config, _SLOTS, bounds, since=begin, until=end + LATE_S):
            yield (workload, version), Slot(at, *sums)
        begin = end


class Policy(Protocol):
    """policies.Running, or what stands in for it."""

    def update(self, slot: Slot) -> bool:
        """Whether to adapt now."""
        ...


@dataclass(frozen=True, slots=True)
class Known:
    """What a draft was worth at promotion, and which slots come after that."""

    baseline: RateEstimate
    since: float                   # slots that end then or later count


class Replay:
    """One policy over many workloads. `push` slots in order of time; `allow` may deny a firing, then the policy goes on as it was."""

    def __init__(self, make: Callable[[RateEstimate | None], Policy], *, cooldown_s: float, lead_s: float = 0.0,
                 known: Callable[[Key], Known | None] = lambda _: None, allow: Callable[[Firing], bool] = lambda _: True) -> None:
        self._make, self._cooldown_s, self._lead_s, self._known, self._allow = make, cooldown_s, lead_s, known, allow
        self._watched: dict[Key, _Watched] = {}
        self._quiet_until: dict[str, float] = {}
        self.firings: list[Firing] = []

    def push(self, key: Key, slot: Slot) -> Firing | None:
        workload = key[0]
        if slot.time < self._quiet_until.get(workload, 0.0):
            return None
        if key not in self._watched:
            self._watched[key] = _Watched(self._make, self._known(key))
        watched = self._watched[key]
        if not watched.update(slot):
            return None
        firing = Firing(slot.time, workload, key[1], watched.recent, watched.before)
        self._quiet_until[workload] = slot.time + max(self._cooldown_s, self._lead_s)
        if not self._allow(firing):
            return None
        self.firings.append(firing)
        self._watched[key] = _Watched(self._make, None)
        return firing


class _Watched:
    """One workload on one draft version."""

    def __init__(self, make: Callable[[RateEstimate | None], Policy], known: Known | None) -> None:
        self._known, self._first = known, Sums()
        self._policy = make(known.baseline if known is not None else None)
        self.recent = -1.0                         # an average of the last slots

    @property
    def before(self) -> float:
        return self._known.baseline.rate if self._known is not None else self._first.rate if self._first.drafted else 0.0

    def update(self, slot: Slot) -> bool:
        if self._known is not None and slot.time < self._known.since:
            return False
        if slot.drafted:
            self.recent = slot.rate if self.recent < 0 else 0.8 * self.recent + 0.2 * slot.rate
            if self._first.drafted < BEGINNING:
                self._first.add(slot)
        return self._policy.update(slot)


def replay(slots: Iterable[tuple[Key, Slot]], make: Callable[[RateEstimate | None], Policy], *, cooldown_s: float,
           lead_s: float = 0.0) -> list[Firing]:
    run = Replay(make, cooldown_s=cooldown_s, lead_s=lead_s)
    for key, slot in slots:
        run.push(key, slot)
    return run.firings
