"""Figures of the acceptance log with their uncertainty: first-position acceptance, time per token, errors. Decides nothing, keeps no rows.

Steps of one request are alike, so the error of a rate is counted over requests (a ratio estimator), and is never smaller than
that of independent steps. Time per token is compared within stretches of time, both sides at once: what slows the whole machine is no
difference between them. Memory is bounded, however long somebody looks.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field

from tide_pipeline.contracts import FinishReason
from tide_pipeline.rollout.rows import LiveRow
from tide_pipeline.rollout.sequential import Gap

BLOCK_S = 2.0                      # stretches in which time per token is compared
MAX_BLOCKS = 1_800                 # of them that may still get rows
MAX_GOING = 65_536                 # requests whose end is awaited; of some it never comes


@dataclass(frozen=True, slots=True)
class Rate:
    """Share of accepted first draft tokens over `steps` drafted steps, and its standard error."""

    rate: float
    error: float
    steps: int
    requests: int = 0


@dataclass(slots=True)
class Side:
    """Sums over the rows of one draft. d drafted steps and a accepted first tokens of a request; their products summed over requests."""

    replicas: set[str] = field(default_factory=set)
    finished: int = 0
    failed: int = 0
    _n: int = 0
    _d: int = 0
    _a: int = 0
    _dd: int = 0
    _da: int = 0
    _aa: int = 0
    _going: OrderedDict[str, tuple[int, int]] = field(default_factory=OrderedDict)     # (d, a) so far of requests that go on

    def add(self, row: LiveRow) -> None:
        self.replicas.add(row.replica)
        if row.finish_reason:
            self.finished += 1
            self.failed += row.finish_reason == FinishReason.ERROR         # what the client ended itself is no error
        before = self._going.pop(row.request_id, (0, 0))
        now = (before[0] + row.drafted, before[1] + row.accepted)
        self._put(*before, sign=-1)
        self._put(*now, sign=1)
        if now[0] and not row.finish_reason:
            self._going[row.request_id] = now
            if len(self._going) > MAX_GOING:
                self._going.popitem(last=False)                            # the one that was silent for longest

    def _put(self, d: int, a: int, *, sign: int) -> None:
        if d:
            self._n += sign
            self._d += sign * d
            self._a += sign * a
            self._dd += sign * d * d
            self._da += sign * d * a
            self._aa += sign * a * a

    def rate(self) -> Rate:
        """0 steps when none drafted."""
        n, steps, accepted = self._n, self._d, self._a
        if not steps:
            return Rate(0.0, 0.0, 0)
        rate = accepted / steps
        residuals = max(0.0, self._aa - 2 * rate * self._da + rate**2 * self._dd)          # sum over requests of (a - rate d)^2
        spread = residuals * n / max(n - 1, 1) / steps**2
        smoothed = (accepted + 1) / (steps + 2)                            # 0 of 5 is not "certainly none"
        return Rate(rate, math.sqrt(max(spread, smoothed * (1 - smoothed) / steps)), steps, n)


class Pace:
    """Time per token of two sides, stretch by stretch; stretches that are long over are kept as sums of their log ratios."""

    def __init__(self) -> None:
        self._blocks: dict[int, tuple[list[float], list[float]]] = {}      # ms and tokens of the new side, of the old
        self._over = -math.inf                                             # no stretch up to this one takes rows
        self._logs = (0, 0.0, 0.0)                                         # of those: n, sum, sum of squares

    def add(self, row: LiveRow, *, is_new: bool) -> None:
        block = int(row.at // BLOCK_S)
        if row.emitted and row.duration_ms > 0 and block > self._over:
            sums = self._blocks.setdefault(block, ([0.0, 0.0], [0.0, 0.0]))[0 if is_new else 1]
            sums[0] += row.duration_ms
            sums[1] += row.emitted
            if len(self._blocks) > MAX_BLOCKS:
                self._close(sorted(self._blocks)[: MAX_BLOCKS // 2])

    def slowdown(self) -> Gap | None:
        """Log of the time per token, new over old, averaged over the stretches in which both answered; None for fewer than 4."""
        n, total, squares = self._with(self._blocks)
        if n < 4:
            return None
        mean = total / n
        spread = max(0.0, squares - n * mean**2) / (n - 3)             # few blocks know their own spread badly: as Student's t is wide
        return Gap(mean, math.sqrt(spread / n), n)

    def _close(self, blocks: list[int]) -> None:
        self._logs = self._with({block: self._blocks.pop(block) for block in blocks})
        self._over = blocks[-1]

    def _with(self, blocks: dict[int, tuple[list[float], list[float]]]) -> tuple[int, float, float]:
        logs = [math.log(new[0] / new[1] * old[1] / old[0]) for new, old in blocks.values() if new[1] and old[1]]
        n, total, squares = self._logs
        return n + len(logs), total + sum(logs), squares + sum(x * x for x in logs)


def error_rise(new: Side, old: Side) -> Gap | None:
    """Difference of the shares of finished requests that ended with an error; None where one side finished none."""
    if not new.finished or not old.finished:
        return None
    (a, a_variance), (b, b_variance) = _errors(new), _errors(old)
    return Gap(a - b, math.sqrt(a_variance + b_variance), min(new.finished, old.finished))


def _errors(side: Side) -> tuple[float, float]:
    """Share and its variance."""
    smoothed = (side.failed + 1) / (side.finished + 2)
    return side.failed / side.finished, smoothed * (1 - smoothed) / side.finished
