"""What a step with a draft costs against one without, from served steps, with the machine's load divided out. Knows the log; no draft.

    ms of a step = load(when) * cost(draft length, batch)

fitted to all steps of a period by weighted least squares of logarithms: a busy hour slows steps with and without a draft alike, so that
plain steps of one moment may stand beside drafted ones of another. Every request of a step has the step's whole time in the log; divided by
the batch these are seconds of the serving device. Prompt chunks are in neither.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tide_pipeline.config import TideConfig
from tide_pipeline.drift.views import read

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

GROUPS = 100                       # of requests, drawn whole: what a bootstrap of single ones would show, at a cost that stays bounded
DRAWS = 200
SWEEPS = 6                         # of alternating means; the factors hardly correlate
LEAST_STEPS = 50                   # of a (draft length, batch), to say what it costs

_ROWS = """
select (hash(request_id) % $groups)::int, floor((epoch(time) - $since) / $bucket_s)::int, workload, draft_version, draft_length,
       greatest(1, round(mean_batch_size))::int, sum(num_steps), sum(emitted_tokens), sum(duration_ms),
       sum(duration_ms / greatest(1, mean_batch_size))
from acceptance where time >= to_timestamp(floor($since)) and epoch(time) > $since and epoch(time) <= $until and num_steps > 0
     and duration_ms > 0
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
    def kinds(self) -> tuple[list[tuple[int, int]], Ints]:
        """The (draft length, batch) that were served, and which of them each row is."""
        pairs = np.stack([self.length_N, self.batch_N], 1)
        found, inverse = np.unique(pairs, axis=0, return_inverse=True)
        return [(int(k), int(b)) for k, b in found], inverse.reshape(-1)


def served_steps(config: TideConfig, since: float, until: float, bucket_s: float) -> Steps:
    """Of the period. Raises LakeError."""
    rows = read(config, _ROWS, {"since": since, "until": until, "bucket_s": float(bucket_s), "groups": GROUPS}, since=since)
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


def cost_ratios(steps: Steps, weights_SG: Floats) -> Floats:
    """[S, K]: the cost of each kind of step over that of a step without a draft at the same batch; NaN where no plain step tells.

    A batch that was never served plain borrows the ratio of the nearest one that was.
    """
    kinds, kind_N = steps.kinds
    served_K = added_up(kind_N, steps.steps_N, len(kinds))
    return np.stack([_ratios(kinds, _fit(steps, kind_N, len(kinds), weights_G), served_K) for weights_G in weights_SG])


def _ratios(kinds: list[tuple[int, int]], log_cost_K: Floats, served_K: Floats) -> Floats:
    cost = {kind: log_cost_K[i] for i, kind in enumerate(kinds) if served_K[i] >= LEAST_STEPS and np.isfinite(log_cost_K[i])}
    ratios = {(k, b): float(np.exp(cost[k, b] - cost[0, b])) for k, b in cost if (0, b) in cost}
    return np.array([_nearest(ratios, k, b) for k, b in kinds])


def added_up(at_N: Ints, values_N: Floats, size: int) -> Floats:
    """[size]: the values at each index."""
    return np.asarray(np.bincount(at_N, values_N, size), dtype=np.float64)


def _nearest(ratios: dict[tuple[int, int], float], length: int, batch: int) -> float:
    if length == 0:
        return 1.0 if ratios else float("nan")
    near = sorted((abs(b - batch), abs(k - length), k, b) for k, b in ratios if k > 0)
    return ratios[near[0][2], near[0][3]] if near and near[0][1] <= 1 else float("nan")


def _fit(steps: Steps, kind_N: Ints, kinds: int, weights_G: Floats) -> Floats:
    """[K] logarithms of costs, up to a constant; NaN for what was not drawn."""
    weight_N = steps.steps_N * weights_G[steps.group_N]
    log_N = np.log(steps.ms_N / steps.steps_N)
    buckets = int(steps.bucket_N.max(initial=0)) + 1
    per_bucket, per_kind = (added_up(at, weight_N, size) for at, size in ((steps.bucket_N, buckets), (kind_N, kinds)))
    load_T, cost_K = np.zeros(buckets), np.zeros(kinds)
    for _ in range(SWEEPS):
        cost_K = added_up(kind_N, weight_N * (log_N - load_T[steps.bucket_N]), kinds) / np.maximum(per_kind, 1e-9)
        load_T = added_up(steps.bucket_N, weight_N * (log_N - cost_K[kind_N]), buckets) / np.maximum(per_bucket, 1e-9)
    cost_K[per_kind <= 0] = np.nan
    return cost_K
