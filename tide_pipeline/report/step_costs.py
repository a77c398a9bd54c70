"""What a step with a draft costs against one without, from served steps, with the machine's load divided out. Knows the log; no draft.

    ms of a step = load(when) * cost(draft length, batch)

fitted to all steps of a period by weighted least squares of logarithms: a busy hour slows steps with and without a draft alike, so that
plain steps of one moment may stand beside drafted ones of another. Every request of a step has the step's whole time in the log; divided by
the batch these are seconds of the serving device. Prompt chunks are in neither.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tide_pipeline.config import TideConfig
from tide_pipeline.drift.views import read

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Kind = tuple[int, int]             # draft length, batch

GROUPS = 100                       # of requests, drawn whole: what a bootstrap of single ones would show, at a cost that stays bounded
DRAWS = 200
SLICE_S = 10.0                     # a load each: it must not change much within one
MOST_SLICES = 400                  # that costs are found from, spread over the period
LEAST_STEPS = 50                   # of a (draft length, batch), to say what it costs

_ROWS = """
select (hash(request_id) % $groups)::int, floor((epoch(time) - $since) / $bucket_s)::int, workload, draft_version, draft_length,
       greatest(1, round(mean_batch_size))::int, sum(num_steps), sum(emitted_tokens), sum(duration_ms),
       sum(duration_ms / greatest(1, mean_batch_size))
from acceptance where time >= to_timestamp(floor($since)) and epoch(time) > $since and epoch(time) <= $until and num_steps > 0
     and duration_ms > 0 and floor((epoch(time) - $since) / $bucket_s)::int % $every = 0
group by all
"""


@dataclass(frozen=True)
class Steps:
    """Served steps, added up: N rows of a group of requests, a time bucket, a workload, a draft version, a draft length and a batch."""

    group_N: Ints
    bucket_N: Ints
    names: list[tuple[str, str]]   # workload, draft version; line_N points here
    line_N: Ints
    length_N: Ints
    batch_N: Ints
    steps_N: Floats
    tokens_N: Floats
    ms_N: Floats                   # as the requests saw them
    device_ms_N: Floats            # shared by the batch

    @property
    def kinds(self) -> tuple[list[Kind], Ints]:
        """The (draft length, batch) that were served, and which of them each row is."""
        pairs = np.stack([self.length_N, self.batch_N], 1)
        found, inverse = np.unique(pairs, axis=0, return_inverse=True)
        return [(int(k), int(b)) for k, b in found], inverse.reshape(-1)


def served_steps(config: TideConfig, since: float, until: float, bucket_s: float, every: int = 1) -> Steps:
    """Of the period, of every so manieth bucket. Raises LakeError."""
    rows = read(config, _ROWS, {"since": since, "until": until, "bucket_s": float(bucket_s), "groups": GROUPS, "every": every}, since=since)
    names = sorted({(str(r[2]), str(r[3])) for r in rows})
    at = {name: i for i, name in enumerate(names)}
    whole = [np.array([r[i] for r in rows], dtype=np.int64) for i in (0, 1, 4, 5)]
    sums = [np.array([float(r[i]) for r in rows]) for i in (6, 7, 8, 9)]
    lines = np.array([at[str(r[2]), str(r[3])] for r in rows], dtype=np.int64)
    return Steps(whole[0], whole[1], names, lines, whole[2], whole[3], *sums)


def drawn_weights(seed: int = 0) -> Floats:
    """[1 + DRAWS, GROUPS]: how often each group counts; row 0 counts all once."""
    drawn = np.random.default_rng(seed).multinomial(GROUPS, np.full(GROUPS, 1 / GROUPS), DRAWS)
    return np.concatenate([np.ones((1, GROUPS)), drawn])


def find_costs(config: TideConfig, since: float, until: float, kinds: Sequence[Kind], weights_SG: Floats) -> Floats:
    """[S, K]: the cost of each kind of step over that of a step without a draft at the same batch; NaN where no plain step tells.

    A batch that was never served plain borrows the ratio of the nearest one that was. Raises LakeError.
    """
    every = max(1, math.ceil((until - since) / SLICE_S / MOST_SLICES))
    steps = served_steps(config, since, until, SLICE_S, every)
    if not len(steps.steps_N):
        return np.full((len(weights_SG), len(kinds)), np.nan)
    served, kind_N = steps.kinds
    slices, slice_N = np.unique(steps.bucket_N, return_inverse=True)
    shape = (GROUPS, len(slices), len(served))
    place_N = (steps.group_N * shape[1] + slice_N.reshape(-1)) * shape[2] + kind_N
    log_N = np.log(steps.ms_N / steps.steps_N)
    steps_GTK, logs_GTK = (added_up(place_N, values_N, math.prod(shape)).reshape(shape) for values_N in
                           (steps.steps_N, steps.steps_N * log_N))
    enough_K = steps_GTK.sum((0, 1)) >= LEAST_STEPS
    fits = (_fit(np.tensordot(weights_G, steps_GTK, 1), np.tensordot(weights_G, logs_GTK, 1)) for weights_G in weights_SG)
    return np.stack([_ratios(dict(zip(served, np.where(enough_K, cost_K, np.nan), strict=True)), kinds) for cost_K in fits])


def _ratios(log_cost: Mapping[Kind, float], kinds: Sequence[Kind]) -> Floats:
    cost = {kind: value for kind, value in log_cost.items() if np.isfinite(value)}
    ratios = {(k, b): float(np.exp(cost[k, b] - cost[0, b])) for k, b in cost if (0, b) in cost}
    return np.array([_nearest(ratios, k, b) for k, b in kinds])


def added_up(at_N: Ints, values_N: Floats, size: int) -> Floats:
    """[size]: the values at each index."""
    return np.asarray(np.bincount(at_N, values_N, size), dtype=np.float64)


def _nearest(ratios: Mapping[Kind, float], length: int, batch: int) -> float:
    if length == 0:
        return 1.0 if ratios else float("nan")
    near = sorted((abs(b - batch), abs(k - length), k, b) for k, b in ratios if k > 0)
    return ratios[near[0][2], near[0][3]] if near and near[0][1] <= 1 else float("nan")


def _fit(steps_TK: Floats, logs_TK: Floats) -> Floats:
    """[K] logarithms of costs, up to a constant; NaN for what was not drawn. T = time slices, each with a load of its own.

    Least squares of log ms = load_T + cost_K, the loads solved for first: what is left is K equations.
    """
    steps_T, steps_K = np.maximum(steps_TK.sum(1), 1e-9), steps_TK.sum(0)
    shares_TK = steps_TK / steps_T[:, None]
    left_KK = np.diag(steps_K) - steps_TK.T @ shares_TK
    right_K = logs_TK.sum(0) - shares_TK.T @ logs_TK.sum(1)
    cost_K: Floats = np.linalg.lstsq(left_KK, right_K, rcond=1e-9)[0]       # costs have no zero: the shortest of all solutions
    cost_K[steps_K <= 0] = np.nan
    return cost_K
