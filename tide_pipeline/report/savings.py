"""What drafts saved over a period: against no speculation, and against the draft that was served first. Adds up; draws nothing.

    served       seconds of the serving device that the period's steps took, as logged
    none         the same tokens at one a step: a step without a draft costs 1 / (cost ratio) of the one that was made (step_costs.py)
    static       served * speed(draft that served) / speed(first draft), both replayed on the same held-out windows of that time
                 (replayed.py), where speed is the best over draft lengths of tokens per step / cost ratio, and at least that of no draft:
                 the controller would have chosen so, for either

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
from tide_pipeline.report.replayed import REACH, REACH_S, Accepted, Line, replay_lines, shares
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
    """A draft beside the static one on held-out windows that it served, weighed by the time that each stands for."""

    workload: str
    draft_version: str
    windows: int
    prompts: int
    static_length: float           # tokens per step at gate.draft_length, bonus token included
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
                 training: Sequence[tuple[float, float]]) -> Savings | None:
    """None without a served step. `drafts`: version -> folder, `static`: the version served first. Raises LakeError."""
    steps = served_steps(config, since, until, bucket_s)
    if not len(steps.steps_N):
        return None
    kinds, kind_N = steps.kinds
    weights_SG = drawn_weights()
    ratio_SK = find_costs(config, since, until, kinds, weights_SG)
    times_T = np.minimum(since + bucket_s * (np.arange(int(steps.bucket_N.max()) + 1) + 1), until)
    others = [line for line in steps.names if static and line[1] not in ("", static)]
    replayed = replay_lines(config, drafts, static, others, since, until)
    cells = _Cells(steps, times_T - bucket_s / 2, max(REACH_S, REACH * (until - since)))
    speeds = _Speeds(steps, ratio_SK, cells, replayed, static)
    against = [_against(NONE, steps, kind_N, steps.tokens_N / steps.steps_N, 1.0 / ratio_SK, weights_SG, times_T),
               _against(STATIC, steps, cells.at_N, np.ones(len(kind_N)), speeds.factor_SC, weights_SG, times_T) if static else None]
    return Savings(float(steps.tokens_N.sum()), float(steps.device_ms_N.sum()) / 1e3, sum(seconds for _, seconds in training), static,
                   [a for a in against if a is not None], speeds.table(), _costs(steps, ratio_SK), sorted(training))


class _Cells:
    """Rows by what they are compared in: what served which workload in which bucket."""

    def __init__(self, steps: Steps, middle_T: Floats, reach_s: float) -> None:
        found, at_N = np.unique(np.stack([steps.line_N, steps.bucket_N], 1), axis=0, return_inverse=True)
        self.at_N: Ints = at_N.reshape(-1)
        self.lines = [steps.names[line] for line in found[:, 0]]
        self.middle_C: Floats = middle_T[found[:, 1]]
        self.served_C = added_up(self.at_N, steps.device_ms_N, len(self.lines))
        self.reach_s = reach_s


class _Speeds:
    """factor [S, C]: what the static draft's time would be over the served one, for every draw; NaN where nothing tells."""

    def __init__(self, steps: Steps, ratio_SK: Floats, cells: _Cells, replayed: Mapping[Line, Accepted], static: str) -> None:
        self.draws, self.cells, self.replayed = len(ratio_SK), cells, replayed
        self.by_length = {length: ratio_S for length, ratio_S, _ in _by_length(steps, ratio_SK)}
        self.factor_SC = np.full((self.draws, len(cells.lines)), np.nan)
        for c, line in enumerate(cells.lines):
            if line[1] in ("", static):                    # "": requests that asked for none, or found none
                self.factor_SC[:, c] = 1.0
        for line, found in replayed.items():
            self._judge(line, found)

    def _judge(self, line: Line, found: Accepted) -> None:
        drawn_SP = np.random.default_rng(found.prompts).multinomial(found.prompts, np.full(found.prompts, 1 / found.prompts),
                                                                    self.draws).astype(float)
        drawn_SP[0] = 1.0
        unknown_S = np.full(self.draws, np.nan)
        ratio_SL = np.stack([self.by_length.get(length, unknown_S) for length in range(1, found.served_WL.shape[1] + 1)], 1)
        for c in self._cells_of(line):
            near = found.nearest(self.cells.middle_C[c], self.cells.reach_s)
            weights_SW = drawn_SP[:, found.prompt_W[near]]
            if len(near) and found.served_steps_W[near].sum() > 0:
                self.factor_SC[:, c] = (speed(shares(found.served_WL[near], found.served_steps_W[near], weights_SW), ratio_SL)
                                        / speed(shares(found.static_WL[near], found.static_steps_W[near], weights_SW), ratio_SL))

    def _cells_of(self, line: Line) -> list[int]:
        return [c for c, name in enumerate(self.cells.lines) if name == line]

    def table(self) -> list[Replayed]:
        """One row for each line that was judged."""
        out = []
        for line, found in sorted(self.replayed.items()):
            known = [c for c in self._cells_of(line) if np.isfinite(self.factor_SC[0, c])]
            if not known:
                continue
            weight_W = np.zeros(len(found.at_W))
            for c in known:
                weight_W[found.nearest(self.cells.middle_C[c], self.cells.reach_s)] += self.cells.served_C[c]
            static, served = (1.0 + float(shares(accepted_WL, steps_W, weight_W[None])[0].sum()) for accepted_WL, steps_W in
                              ((found.static_WL, found.static_steps_W), (found.served_WL, found.served_steps_W)))
            time_C = self.cells.served_C[known]
            out.append(Replayed(*line, len(found.at_W), found.prompts, static, served,
                                interval(self.factor_SC[:, known] @ time_C / time_C.sum(), found.prompts)))
        return out


def speed(shares_SL: Floats, ratio_SL: Floats) -> Floats:
    """[S]: tokens per time of a plain step at the best draft length; 1 without a draft. A length that was never served is passed over."""
    tokens_SL = 1.0 + np.cumsum(shares_SL, axis=1)
    best: Floats = np.nan_to_num(tokens_SL / ratio_SL, nan=1.0).max(axis=1, initial=1.0)
    return best


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
