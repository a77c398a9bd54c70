"""What drafts saved over a period: against no speculation, and against the draft that was served first. Adds up; draws nothing.

    served       seconds of the serving device that the period's steps took, as logged
    none         the same tokens at one a step: a step without a draft costs 1 / (cost ratio) of the one that was made (step_costs.py)
    static       served * speed(draft that served) / speed(first draft), both replayed on the same held-out windows (replayed.py), where
                 speed is the best over draft lengths of tokens per step / cost ratio: the controller would have chosen so, for either draft

Intervals are bootstrap 95 %: requests in groups for costs, prompts for replays, drawn together. A second of training counts as one of
serving.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tide_pipeline.config import TideConfig
from tide_pipeline.report.replayed import Accepted, Place, Regimes, replay_regimes
from tide_pipeline.report.step_costs import DRAWS, GROUPS, Ints, Steps, added_up, drawn_weights, find_costs, served_steps

Floats = NDArray[np.float64]

NONE, STATIC = "no speculation", "the static draft"


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Against:
    """What was saved against one alternative, over the part of the traffic that could be judged."""

    name: str
    seconds: Interval              # that the alternative would have taken for that part
    saved_s: Interval
    tokens_per_s: Interval         # of the alternative, per second of the device
    judged_share: float            # of the served seconds
    line: Sequence[tuple[float, float, float, float]] = ()     # Unix time, saved so far, its low, its high


@dataclass(frozen=True)
class Replayed:
    """A draft beside the static one on the held-out windows of one regime."""

    workload: str
    since: float
    draft_version: str
    prompts: int
    static_length: float
    served_length: float
    speed: Interval                # of the draft over the static one


@dataclass(frozen=True)
class Savings:
    """Everything in seconds of one serving device (replica)."""

    tokens: float
    served_s: float
    training_s: float
    static_version: str
    against: Sequence[Against] = ()
    replays: Sequence[Replayed] = ()
    costs: Sequence[tuple[int, Interval, float]] = ()          # draft length, cost of a step over a plain one, steps
    training: Sequence[tuple[float, float]] = ()               # Unix time a training ended, its seconds


def find_savings(config: TideConfig, since: float, until: float, bucket_s: float, *, static: str, drafts: Mapping[str, Path],
                 regimes: Regimes, training: Sequence[tuple[float, float]]) -> Savings | None:
    """None without a served step. `drafts`: version -> folder, `static`: the version served first. Raises LakeError."""
    steps = served_steps(config, since, until, bucket_s)
    if not len(steps.steps_N):
        return None
    weights_SG = drawn_weights()
    ratio_SK = find_costs(config, since, until, steps.kinds[0], weights_SG)
    parts = _Parts(steps, regimes, since, bucket_s)
    wanted = {place: {static, *versions} for place, versions in parts.versions(static).items()}
    speeds = _Speeds(steps, ratio_SK, replay_regimes(config, drafts, wanted, regimes, since, until), static)
    times_T = np.minimum(since + bucket_s * (np.arange(parts.buckets) + 1), until)
    by_static = np.stack([speeds.of(place, version) for place, version in parts.names], 1)
    kind_N = steps.kinds[1]
    against = [_against(NONE, steps, kind_N, steps.tokens_N / steps.steps_N, 1.0 / ratio_SK, weights_SG, times_T),
               _against(STATIC, steps, parts.at_N, np.ones(len(kind_N)), by_static, weights_SG, times_T) if static else None]
    return Savings(float(steps.tokens_N.sum()), float(steps.device_ms_N.sum()) / 1e3, sum(seconds for _, seconds in training), static,
                   [a for a in against if a is not None], speeds.table(parts, regimes, since), _costs(steps, ratio_SK), sorted(training))


class _Parts:
    """Rows by what they are compared in: a regime of a workload, and the draft version that served it."""

    def __init__(self, steps: Steps, regimes: Regimes, since: float, bucket_s: float) -> None:
        self.buckets = int(steps.bucket_N.max()) + 1
        ends_T = since + bucket_s * (np.arange(self.buckets) + 1)      # a draft never serves before the drift it was trained for
        keys = [((steps.names[line][0], regimes.of(steps.names[line][0], ends_T[bucket])), steps.names[line][1])
                for line, bucket in zip(steps.line_N.tolist(), steps.bucket_N.tolist(), strict=True)]
        self.names: list[tuple[Place, str]] = sorted(set(keys))
        at = {key: i for i, key in enumerate(self.names)}
        self.at_N = np.array([at[key] for key in keys])

    def versions(self, static: str) -> dict[Place, set[str]]:
        """The drafts other than the static one that served each place."""
        found: dict[Place, set[str]] = {}
        for place, version in self.names:
            if version and version != static and static:
                found.setdefault(place, set()).add(version)
        return found


class _Speeds:
    """How much faster each draft is than the static one, for every draw."""

    def __init__(self, steps: Steps, ratio_SK: Floats, replayed: Mapping[Place, Mapping[str, Accepted]], static: str) -> None:
        self.replayed, self.static, self.draws = replayed, static, len(ratio_SK)
        lengths = next((a.accepted_PL.shape[1] for found in replayed.values() for a in found.values()), 0)
        by_length = {length: ratio_S for length, ratio_S, _ in _by_length(steps, ratio_SK)}
        unknown_S = np.full(self.draws, np.nan)
        self.ratio_SL = np.stack([by_length.get(length, unknown_S) for length in range(1, lengths + 1)] or [unknown_S], 1)

    def of(self, place: Place, version: str) -> Floats:
        """[S]: what the static draft's time would be over the one that was served; NaN where nothing tells."""
        if version == self.static or not version:          # "": requests that asked for none, or found none
            return np.ones(self.draws)
        found = self.replayed.get(place, {})
        if version not in found or self.static not in found:
            return np.full(self.draws, np.nan)
        prompts = len(found[version].steps_P)
        drawn_SP = np.random.default_rng(prompts).multinomial(prompts, np.full(prompts, 1 / prompts), self.draws).astype(float)
        drawn_SP[0] = 1.0
        return np.array([_speed(found[version].shares(w), r) / _speed(found[self.static].shares(w), r)
                         for w, r in zip(drawn_SP, self.ratio_SL, strict=True)])

    def table(self, parts: _Parts, regimes: Regimes, since: float) -> list[Replayed]:
        out = []
        for place, version in parts.names:
            found = self.replayed.get(place, {})
            if version in found and version != self.static and self.static in found:
                starts = regimes.starts.get(place[0], ())
                out.append(Replayed(place[0], max(since, starts[place[1] - 1]) if place[1] else since, version,
                                    len(found[version].steps_P), found[self.static].length, found[version].length,
                                    interval(self.of(place, version), len(found[version].steps_P))))
        return out


def _speed(shares_L: Floats, ratio_L: Floats) -> float:
    """Tokens per time of a plain step: at the best draft length, 1 without a draft."""
    tokens_L = 1.0 + np.cumsum(shares_L)
    return float(max(1.0, np.nanmax(tokens_L / ratio_L, initial=1.0)))


def _by_length(steps: Steps, ratio_SK: Floats) -> list[tuple[int, Floats, float]]:
    """Draft length, [S] cost ratio over all batches as they were served, steps."""
    kinds, kind_N = steps.kinds
    served_K, out = added_up(kind_N, steps.steps_N, len(kinds)), []
    for length in sorted({k for k, _ in kinds} - {0}):
        chosen = [i for i, (k, _) in enumerate(kinds) if k == length and np.isfinite(ratio_SK[0, i])]
        if chosen:
            known_SC = np.where(np.isfinite(ratio_SK[:, chosen]), ratio_SK[:, chosen], ratio_SK[0, chosen])
            out.append((length, known_SC @ served_K[chosen] / served_K[chosen].sum(), float(served_K[chosen].sum())))
    return out


def _against(name: str, steps: Steps, cell_N: Ints, fixed_N: Floats, factor_SC: Floats, weights_SG: Floats,
             times_T: Floats) -> Against | None:
    """The alternative takes `fixed` * `factor` times as long as was served; C are kinds of rows. None where no row can be judged."""
    cells = factor_SC.shape[1]
    known_C = np.isfinite(factor_SC[0])
    factor_SC = np.where(np.isfinite(factor_SC), factor_SC, np.nan_to_num(factor_SC[0]))
    served_N = np.where(known_C[cell_N], steps.device_ms_N / 1e3, 0.0)
    served_s = float(served_N.sum())
    if served_s <= 0:
        return None
    served_GC, other_GC = (_summed(steps.group_N, cell_N, values, (GROUPS, cells)) for values in (served_N, served_N * fixed_N))
    # how much longer it takes varies from draw to draw; how much was served is what it was
    times_S = served_s * ((weights_SG @ other_GC) * factor_SC).sum(1) / np.maximum((weights_SG @ served_GC).sum(1), 1e-9)
    tokens = float(steps.tokens_N[known_C[cell_N]].sum())
    whole, saved = interval(times_S), interval(times_S - served_s)
    line_T = np.cumsum(added_up(steps.bucket_N, served_N * (fixed_N * factor_SC[0, cell_N] - 1.0), len(times_T)))
    below, above = ((end - saved.estimate) / max(abs(saved.estimate), 1e-9) for end in (saved.low, saved.high))
    return Against(name, whole, saved, Interval(tokens / whole.estimate, tokens / whole.high, tokens / whole.low),
                   served_s / float(steps.device_ms_N.sum() / 1e3),
                   [(float(t), float(y), float(y + abs(y) * below), float(y + abs(y) * above))
                    for t, y in zip(times_T, line_T, strict=True)])


def _summed(row_N: Ints, column_N: Ints, values_N: Floats, shape: tuple[int, int]) -> Floats:
    return added_up(row_N * shape[1] + column_N, values_N, shape[0] * shape[1]).reshape(shape)


def interval(draws_S: Floats, clusters: int = 0) -> Interval:
    """Draw 0 is the estimate. Few clusters widen it (gate/offline.py says why)."""
    known = draws_S[np.isfinite(draws_S)]
    estimate = float(draws_S[0])
    low, high = (float(q) for q in np.quantile(known[1:], (0.025, 0.975))) if len(known) > DRAWS // 2 else (float("-inf"), float("inf"))
    wider = _few(clusters) if clusters else 1.0
    return Interval(estimate, estimate + (low - estimate) * wider, estimate + (high - estimate) * wider)


def _few(clusters: int) -> float:
    from tide_pipeline.gate.offline import few_prompts  # imports torch

    return few_prompts(clusters)


def _costs(steps: Steps, ratio_SK: Floats) -> list[tuple[int, Interval, float]]:
    return [(length, interval(ratio_S), served) for length, ratio_S, served in _by_length(steps, ratio_SK)]
