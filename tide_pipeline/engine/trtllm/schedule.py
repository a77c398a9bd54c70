"""Draft length by batch size: what pays, from what steps cost and how far drafts survive. Pure; knows no server and no log.

A step that verifies k draft tokens for each of b requests is expected to yield b * (1 + S[1] + .. + S[k]) tokens, S[j] being the chance
that the first j are all accepted. For every b the k of the highest rate is taken, from 1 on: with 0 TensorRT-LLM stops
feeding the draft, whose cache then stays behind for requests in flight (NVIDIA/TensorRT-LLM#16888): "off" is another replica's business
(serve/front).

Schedules are {largest batch: length}; options.translate_schedule turns that into what a version's keys mean.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

FLOOR = 1
NEWEST = 0.05                      # weight of the newest step in its cell
FIT_STEPS = 100.0                  # measured steps that weigh as much in a cell as the line through all cells

StepMs = Callable[[int, int], float]       # batch, draft length -> ms


@dataclass(frozen=True, slots=True)
class StepCell:
    """What steps of one batch size and draft length took."""

    batch: int
    length: int
    ms: float
    steps: float                   # of the engine: one for all its requests


def best_lengths(step_ms: StepMs, chances: Sequence[float], batches: Iterable[int], floor: int = FLOOR) -> dict[int, int]:
    """By batch size. `chances` are S[1], S[2], ..; lengths never grow with the batch, as a schedule can't.

    Where batches are padded to sizes that have a graph, `batches` are those sizes: all that are padded to one cost the same.
    """
    found, most = {}, len(chances)
    for batch in sorted(batches):
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
    """How long passes took, by batch and draft length: averages of what was served, for EngineStats."""

    def __init__(self) -> None:
        self.cells: dict[tuple[int, int], float] = {}

    def observe(self, batch: int, length: int, ms: float) -> None:
        """May be called from one thread while others read."""
        before = self.cells.get((batch, length), ms)
        self.cells[batch, length] = before + NEWEST * (min(ms, 2 * before) - before)

    def table(self) -> dict[str, float]:
        """"b<batch>k<length>" -> ms."""
        return {f"b{batch}k{length}": round(ms, 3) for (batch, length), ms in sorted(self.cells.items())}


def fit_steps(cells: Sequence[StepCell]) -> StepMs:
    """Times of steps, seen or not: a line that only rises, through all cells; a cell with many steps goes by its own.

        ms = a + b * batch + c * batch * (1 + length) + d * length          none below 0

    Raises ValueError with fewer than four cells, or all of one length.
    """
    if len(cells) < 4 or len({cell.length for cell in cells}) < 2:
        raise ValueError("too few step times (four cells, two draft lengths): serve more before a schedule is made")
    weights, known = _rising_line(cells), {(cell.batch, cell.length): cell for cell in cells}
    least = min(cell.ms for cell in cells) / 2

    def step_ms(batch: int, length: int) -> float:
        on_line = max(least, sum(w * x for w, x in zip(weights, _row(batch, length), strict=True)))
        cell = known.get((batch, length))
        return on_line if cell is None else (cell.steps * cell.ms + FIT_STEPS * on_line) / (cell.steps + FIT_STEPS)

    return step_ms


def _rising_line(cells: Sequence[StepCell]) -> list[float]:
    """Weighted least squares; what would fall with the batch or the length is noise and left out, the worst first."""
    import numpy as np

    scale = np.array([cell.steps for cell in cells]) ** 0.5
    rows = np.array([_row(cell.batch, cell.length) for cell in cells]) * scale[:, None]
    times, kept = np.array([cell.ms for cell in cells]) * scale, list(range(rows.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(rows[:, kept], times, rcond=None)
        if found.min() >= 0 or len(kept) == 1:
            return [float(found[kept.index(i)]) if i in kept else 0.0 for i in range(rows.shape[1])]
        del kept[int(found.argmin())]


def _row(batch: int, length: int) -> list[float]:
    return [1.0, float(batch), float(batch * (1 + length)), float(length)]
