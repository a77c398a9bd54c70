"""What a policy would have done with the recorded traffic: fired when, cost what, gained what. Draws nothing, launches nothing.

Gain is what nobody measured, so it is said what is assumed: from `train_s` after a firing until the workload's next one, or `pay_back_s`,
each slot's throughput would have been higher by worth.gain_share of the drop at the firing; one that fires without a fall gains nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from tide_pipeline.config import TideConfig
from tide_pipeline.drift.deployed import read_deployed
from tide_pipeline.drift.early import early_life
from tide_pipeline.drift.policies import POLICIES, Running
from tide_pipeline.drift.replay import Firing, Key, Known, Replay, recorded
from tide_pipeline.drift.slots import Slot
from tide_pipeline.drift.worth import Price, gain_share
from tide_pipeline.errors import InvalidRequest

DAY_S = 86_400.0
MOST_POINTS = 400                  # of a workload's line in the plot


@dataclass
class Outcome:
    """Of one policy."""

    policy: str
    firings: list[Firing] = field(default_factory=list)
    denied: int = 0                # firings that the budget of training hours did not pay for
    train_hours: float = 0.0
    lost_tokens: float = 0.0       # while training
    gained_tokens: float = 0.0     # as assumed

    @property
    def net_tokens(self) -> float:
        return self.gained_tokens - self.lost_tokens


@dataclass(frozen=True)
class Backtest:
    """Of some policies over one period."""

    target: str
    since: float                   # Unix seconds
    until: float
    tokens: int                    # served in it
    outcomes: Sequence[Outcome]
    lines: Mapping[Key, Sequence[tuple[float, float]]]     # workload and draft -> (time, first-position rate)


def backtest(config: TideConfig, policies: Sequence[str], since: float, until: float, slot_s: float = 5.0) -> Backtest:
    """Each policy sees the whole period. Raises InvalidRequest for a policy that is not there, LakeError when the log can't be read."""
    unknown = sorted(set(policies) - POLICIES.keys())
    if unknown:
        raise InvalidRequest(f"no policy {', '.join(unknown)}: choose from {', '.join(POLICIES)}")
    price = Price.of(config)
    known = _known(config, slot_s)
    runs = [_Run(name, config, price, known) for name in policies]
    lines, tokens = _Lines((until - since) / MOST_POINTS), 0
    for key, slot in recorded(config, since, until, slot_s):
        tokens += slot.tokens
        for run in runs:
            run.push(key, slot)
        if slot.drafted:
            lines.add(key, slot.time, slot.drafted, slot.accepted)
    for run in runs:
        run.outcome.lost_tokens = run.outcome.train_hours * 3600 * price.slowdown * tokens / max(until - since, 1e-9)
    return Backtest(config.target, since, until, tokens, [run.outcome for run in runs], lines.made)


def _known(config: TideConfig, slot_s: float) -> Callable[[Key], Known | None]:
    """What the sensor compares a workload with; None where the draft's early life is not in the log, or not complete in it."""
    deployed = read_deployed(config)

    @cache
    def known(key: Key) -> Known | None:
        workload, version = key
        early = early_life(config, version, deployed.since.get(version)).of(workload)
        return Known(early.estimate, early.until + slot_s) if early is not None and early.is_complete else None
    return known


class _Run:
    """One policy, its budget and its earnings."""

    def __init__(self, name: str, config: TideConfig, price: Price, known: Callable[[Key], Known | None]) -> None:
        self.outcome, self._price = Outcome(name), price
        self._hours_per_day = config.drift.training_hours_per_day
        self._lifted: dict[str, Firing] = {}       # workload -> the firing whose draft it would be served by
        self._replay = Replay(lambda baseline: Running(name, config.drift, config.capture, baseline),
                              cooldown_s=config.drift.cooldown_s, lead_s=price.train_s, known=known, allow=self._can_pay)

    def push(self, key: Key, slot: Slot) -> None:
        self._earn(key[0], slot)
        firing = self._replay.push(key, slot)
        if firing is not None:
            self.outcome.firings.append(firing)
            self.outcome.train_hours += self._price.train_s / 3600
            self._lifted[firing.workload] = firing

    def _can_pay(self, firing: Firing) -> bool:
        last_day = 1 + sum(f.time > firing.time - DAY_S for f in self.outcome.firings)
        is_paid = not self._hours_per_day or last_day * self._price.train_s / 3600 <= self._hours_per_day
        self.outcome.denied += not is_paid
        return is_paid

    def _earn(self, workload: str, slot: Slot) -> None:
        firing, price = self._lifted.get(workload), self._price
        if firing is None or not slot.drafted or slot.time < firing.time + price.train_s:
            return
        if not price.pay_back_s or slot.time < firing.time + price.train_s + price.pay_back_s:
            drop = min(firing.drop, firing.before - slot.rate)
            self.outcome.gained_tokens += slot.tokens * gain_share(slot.rate, drop, price)


class _Lines:
    """Rates in stretches of time."""

    def __init__(self, stretch_s: float) -> None:
        self._stretch_s = max(stretch_s, 1e-9)
        self._open: dict[Key, tuple[int, int, int]] = {}       # number of the stretch, drafted, accepted
        self.made: dict[Key, list[tuple[float, float]]] = {}

    def add(self, key: Key, time: float, drafted: int, accepted: int) -> None:
        number = int(time / self._stretch_s)
        at, d, a = self._open.get(key, (number, 0, 0))
        if at != number:
            d, a = 0, 0
            self.made[key].append((0.0, 0.0))
        d, a = d + drafted, a + accepted
        points = self.made.setdefault(key, [(0.0, 0.0)])
        points[-1] = ((number + 0.5) * self._stretch_s, a / d)
        self._open[key] = number, d, a
