"""Figures of the acceptance log with their uncertainty: first-position acceptance, time per token, errors. Decides nothing, keeps no rows.

Steps of one request are alike, so the error of a rate is counted over requests (a ratio estimator), and is never smaller than
that of independent steps. Time per token is compared within stretches of time, both sides at once: what slows the whole machine is no
difference between them. Stretches that are like the one before them count for less. Memory is bounded, however long somebody looks.
"""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

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


@dataclass(slots=True)
class Series:
    """Sums over values in their order: their mean, their spread, and how like the one before each is."""

    n: int = 0
    total: float = 0.0
    squares: float = 0.0
    products: float = 0.0          # of neighbours
    first: float = 0.0
    last: float = 0.0

    def add(self, value: float) -> None:
        self.first = self.first if self.n else value
        self.products += self.last * value if self.n else 0.0
        self.n, self.total, self.squares, self.last = self.n + 1, self.total + value, self.squares + value * value, value

    @property
    def mean(self) -> float:
        return self.total / self.n if self.n else 0.0

    def off(self) -> tuple[float, float]:
        """Sums of the squares, and of the products of neighbours, about the mean."""
        mean = self.mean
        products = self.products - mean * (2 * self.total - self.first - self.last) + (self.n - 1) * mean * mean
        return max(0.0, self.squares - self.n * mean * mean), products if self.n > 1 else 0.0


class Stretches:
    """Log of the time per token in each stretch, or with two sides of the first over the second; those long over are kept as sums."""

    def __init__(self, sides: int = 1) -> None:
        self._sides = sides
        self._blocks: dict[int, list[list[float]]] = {}                    # ms and tokens of each side
        self._over = -math.inf                                             # no stretch up to this one takes rows
        self._closed = Series()                                            # of those

    def add(self, row: LiveRow, side: int = 0) -> None:
        block = int(row.at // BLOCK_S)
        if row.emitted and row.duration_ms > 0 and block > self._over:
            sums = self._blocks.setdefault(block, [[0.0, 0.0] for _ in range(self._sides)])[side]
            sums[0] += row.duration_ms
            sums[1] += row.emitted
            if len(self._blocks) > MAX_BLOCKS:
                self._close(sorted(self._blocks)[: MAX_BLOCKS // 2])

    def series(self) -> Series:
        """Of the stretches in which every side answered."""
        return self._with(self._closed, sorted(self._blocks))

    def _close(self, blocks: list[int]) -> None:
        self._closed, self._over = self._with(self._closed, blocks), blocks[-1]
        for block in blocks:
            del self._blocks[block]

    def _with(self, series: Series, blocks: list[int]) -> Series:
        found = replace(series)
        for block in blocks:
            if all(tokens for _, tokens in self._blocks[block]):
                logs = [math.log(ms / tokens) for ms, tokens in self._blocks[block]]
                found.add(logs[0] - sum(logs[1:]))
        return found


class ByBatch:
    """Stretches of one side by batch size: 1, 2, 3 to 5, 6 to 11, ..."""

    def __init__(self) -> None:
        self._sizes: defaultdict[int, Stretches] = defaultdict(Stretches)

    def add(self, row: LiveRow) -> None:
        self._sizes[round(math.log2(max(row.batch, 1.0)))].add(row)

    def series(self) -> dict[int, Series]:
        found = {size: stretches.series() for size, stretches in self._sizes.items()}
        return {size: series for size, series in found.items() if series.n}


def slowdown(both: Stretches) -> Gap | None:
    """Mean log of the time per token, new over old, where both answered at the same time; None for fewer than 4 stretches."""
    series = both.series()
    n = series.n
    if n < 4:
        return None
    spread = series.off()[0] / (n - 3)                                     # few blocks know their own spread badly: as Student's t is wide
    return Gap(series.mean, math.sqrt(spread / n) * _alike([series]), n)


def slowdown_since(new: ByBatch, old: ByBatch) -> Gap | None:
    """The same of stretches that lie one behind the other, for a replica with none beside it: mean logs at about the same batch size.

    What changed on the machine in between counts as the draft's. `n` is of the side with fewer stretches; None where too few match.
    """
    a, b = new.series(), old.series()
    both = [(a[size], b[size]) for size in a.keys() & b.keys()]
    sides = [side for pair in both for side in pair]
    free = sum(side.n - 1 for side in sides)
    if free < 4:
        return None
    weights = [x.n * y.n / (x.n + y.n) for x, y in both]
    mean = sum(w * (x.mean - y.mean) for w, (x, y) in zip(weights, both, strict=True)) / sum(weights)
    spread = sum(side.off()[0] for side in sides) / max(free - 2, 1)       # wide, as above
    return Gap(mean, math.sqrt(spread / sum(weights)) * _alike(sides), min(sum(x.n for x, _ in both), sum(y.n for _, y in both)))


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


def _alike(sides: Iterable[Series]) -> float:
    """How much wider an error is because a stretch is like the one before it: sqrt((1 + r) / (1 - r)), r their correlation."""
    squares, products = (sum(column) for column in zip(*(side.off() for side in sides), strict=True))
    r = min(max(products / squares, 0.0), 0.9) if squares else 0.0
    return math.sqrt((1 + r) / (1 - r))
