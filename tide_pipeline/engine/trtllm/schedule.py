"""Draft length by batch size: what pays, from what steps cost and how far drafts survive. Pure; knows no server.

A step that verifies k draft tokens for each of b requests is expected to yield b * (1 + S[1] + .. + S[k]) tokens, S[j] being the chance
that the first j are all accepted. For every b the k of the highest rate is taken, from 1 on: with 0 TensorRT-LLM stops
feeding the draft, whose cache then stays behind for requests in flight (NVIDIA/TensorRT-LLM#16888): "off" is another replica's business
(serve/front).

Schedules are {largest batch: length}; options.translate_schedule turns that into what a version's keys mean.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from tide_pipeline.engine.costs import StepCosts

FLOOR = 1
NEWEST = 0.05                      # weight of the newest step in its cell

StepMs = Callable[[int, int], float]       # batch, draft length -> ms


def of_costs(costs: StepCosts, context: int = 0) -> StepMs:
    """The embedded engine's table: the same step, measured in two parts."""
    return lambda batch, length: costs.draft_ms(batch, length, context) + costs.verify_ms(batch, batch * (1 + length), context)


def best_lengths(step_ms: StepMs, chances: Sequence[float], max_batch: int, floor: int = FLOOR) -> dict[int, int]:
    """By batch size 1..max_batch. `chances` are S[1], S[2], ..; lengths never grow with the batch, as a schedule can't."""
    found, most = {}, len(chances)
    for batch in range(1, max_batch + 1):
        most = found[batch] = max(range(floor, max(floor, most) + 1), key=lambda k: (rate(step_ms, chances, batch, k), -k))
    return found


def rate(step_ms: StepMs, chances: Sequence[float], batch: int, length: int) -> float:
    """Expected tokens a ms."""
    return batch * (1.0 + sum(chances[:length])) / step_ms(batch, length)


def break_even(step_ms: StepMs, chances: Sequence[float], max_batch: int) -> int:
    """The largest batch up to which speculation pays at every size; 0: at none. Where a version can't change the length by batch, more
    than this is for a plain replica."""
    pays = (max(rate(step_ms, chances, b, k) for k in range(1, len(chances) + 1)) > rate(step_ms, chances, b, 0)
            for b in range(1, max_batch + 1))
    return sum(1 for _ in itertools.takewhile(bool, pays))


def as_schedule(lengths: Mapping[int, int]) -> dict[int, int]:
    """{largest batch: length}, its last key the largest batch of all: above the last key nothing would be drafted."""
    out: dict[int, int] = {}
    for batch in sorted(lengths):
        if out and out[max(out)] == lengths[batch]:
            del out[max(out)]
        out[batch] = lengths[batch]
    return out


def length_at(schedule: Mapping[int, int], batch: int) -> int:
    """Of a schedule above; 0 beyond its last key."""
    return next((schedule[key] for key in sorted(schedule) if batch <= key), 0)


class StepTimes:
    """How long passes took, by batch and draft length: averages of what was served, and a straight line through them for what was not.

        ms = a + b * batch + c * batch * (1 + length) + d * length
    """

    def __init__(self) -> None:
        self.cells: dict[tuple[int, int], float] = {}

    def observe(self, batch: int, length: int, ms: float) -> None:
        """May be called from one thread while others read."""
        before = self.cells.get((batch, length), ms)
        self.cells[batch, length] = before + NEWEST * (min(ms, 2 * before) - before)

    def table(self) -> dict[str, float]:
        """"b<batch>k<length>" -> ms."""
        return {f"b{batch}k{length}": round(ms, 3) for (batch, length), ms in sorted(self.cells.items())}

    def fitted(self) -> StepMs:
        """What was seen is taken as it is. Raises ValueError with fewer than four cells, or all of one length."""
        import numpy as np

        cells = dict(self.cells)
        if len(cells) < 4 or len({length for _, length in cells}) < 2:
            raise ValueError("too few step times (four cells, two draft lengths): serve more before a schedule is made")
        rows = np.array([_row(*cell) for cell in cells])
        weights, *_ = np.linalg.lstsq(rows, np.array(list(cells.values())), rcond=None)
        least = min(cells.values())

        def step_ms(batch: int, length: int) -> float:
            return cells.get((batch, length), max(least / 2, float(np.dot(_row(batch, length), weights))))

        return step_ms


def _row(batch: int, length: int) -> list[float]:
    return [1.0, float(batch), float(batch * (1 + length)), float(length)]
