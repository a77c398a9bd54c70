"""What a step costs: measured times of drafting and of verifying, with the machine's load divided out. Knows no network, no requests.

    T_step = load * (draft_ms(members, depth) + verify_ms(batch, rows))          rows = batch + tokens to verify

both at the longest context of the step: attention reads every cached position of every request, and at batch 16 that is half of a step.
The tables are filled by a profile of the idle engine and refreshed by the steps that are served. A busy machine slows every step alike:
that is the load, one number for all cells, which a choice between depths need not know. So a cell that was not visited for long stays
comparable with one that was. Times between measured cells are interpolated.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

LOAD_WEIGHT = 0.25               # of the newest step, in the load
CELL_WEIGHT = 0.01               # and in its own cell: slow, as it is relative to all others
OUTLIER = 2.0                    # a step is taken for at most this many times what it should have taken
CONTEXT_STRIDE = 32              # contexts are told apart by this many positions
REFRESH_STEPS = 64               # served steps between two looks at the cells they have changed

Cell = tuple[int, int, int]      # members or batch, depth or rows, context


class Grid:
    """Times in ms by cell, with straight lines between cells."""

    def __init__(self, cells: Mapping[Cell, float] | None = None) -> None:
        self.cells = dict(cells or {})
        self._folded = 0
        self._forget()

    def ms(self, x: int, y: int, context: int) -> float:
        key = x, context // CONTEXT_STRIDE
        curve = self._curves.get(key)
        if curve is None:
            curve = self._curves[key] = self._mix(x, key[1] * CONTEXT_STRIDE)
        return curve[y] if y < len(curve) else curve[-1] + (curve[-1] - curve[-2]) * (y - len(curve) + 1)

    def add(self, x: int, y: int, ms: float) -> None:
        """Without a profile the first time that is seen counts, for all contexts."""
        self.cells.setdefault((x, y, 0), ms)
        self._forget()

    def fold(self, x: int, y: int, context: int, ratio: float) -> None:
        """Let the cells before and after this context follow a time that was `ratio` times the expected one, the nearer one more."""
        excess = CELL_WEIGHT * (bounded(ratio) - 1.0)
        for c, weight in line_weights(self._contexts, context):
            if (x, y, c) in self.cells:
                self.cells[(x, y, c)] *= 1.0 + min(1.0, max(0.0, weight)) * excess
        self._folded += 1
        if self._folded % REFRESH_STEPS == 0:
            self._forget()

    def _forget(self) -> None:
        """What follows from the cells."""
        self._contexts = sorted({c for _, _, c in self.cells})
        self._most = max((y for _, y, _ in self.cells), default=0) + 1
        self._lines: dict[tuple[int, int], list[float]] = {}       # (members or batch, context) that was measured -> ms by depth or rows
        self._curves: dict[tuple[int, int], list[float]] = {}      # (members or batch, context / stride) -> the same

    def _line(self, x: int, context: int) -> list[float]:
        if (x, context) not in self._lines:
            known = {b: ms for (a, b, c), ms in self.cells.items() if (a, c) == (x, context)}
            self._lines[(x, context)] = [interpolate(known, y) for y in range(self._most + 1)]
        return self._lines[(x, context)]

    def _mix(self, x: int, context: int) -> list[float]:
        """Between the nearest measured x, then between contexts."""
        mixed = [0.0] * (self._most + 1)
        for c, of_context in line_weights(self._contexts, context):
            for a, of_x in line_weights(sorted({a for a, _, at in self.cells if at == c}), x):
                mixed = [ms + of_context * of_x * line for ms, line in zip(mixed, self._line(a, c), strict=True)]
        return mixed


class StepCosts:
    """Times in ms on an idle machine. Without a profile the first steps that are served take its place."""

    def __init__(self) -> None:
        self.load = 1.0
        self.is_profiled = False
        self._draft, self._verify = Grid(), Grid()

    def profile(self, draft: Mapping[Cell, float], verify: Mapping[Cell, float]) -> None:
        """Set what is known: ms by (members, depth, context) and by (batch, rows, context)."""
        self._draft, self._verify, self.load, self.is_profiled = Grid(draft), Grid(verify), 1.0, True

    def observe(self, batch: int, rows: int, verify_ms: float, members: int, depth: int, draft_ms: float, context: int = 0) -> None:
        """Fold in one served step; depth 0 is a step without drafting."""
        if not self.is_profiled:
            self._verify.add(batch, rows, verify_ms)
            if depth:
                self._draft.add(members, depth, draft_ms)
            return
        should_verify, should_draft = self.verify_ms(batch, rows, context), self.draft_ms(members, depth, context)
        ratio = (verify_ms + draft_ms) / (should_verify + should_draft)
        self.load += LOAD_WEIGHT * (bounded(ratio) - self.load)
        self._verify.fold(batch, rows, context, verify_ms / self.load / should_verify)
        if depth:
            self._draft.fold(members, depth, context, draft_ms / self.load / should_draft)

    def draft_ms(self, members: int, depth: int, context: int = 0) -> float:
        """Of drafting `depth` tokens for each of `members` requests. 0 at depth 0."""
        return self._draft.ms(members, depth, context) if depth else 0.0

    def verify_ms(self, batch: int, rows: int, context: int = 0) -> float:
        """Of one pass of the target over `rows` rows of `batch` requests, with everything that is not drafting."""
        return self._verify.ms(batch, rows, context)

    def table(self) -> dict[str, float]:
        """"b<batch>n<rows>c<context>" and "m<members>k<depth>c<context>" -> ms."""
        return {**{f"b{b}n{n}c{c}": round(ms, 3) for (b, n, c), ms in sorted(self._verify.cells.items())},
                **{f"m{m}k{d}c{c}": round(ms, 3) for (m, d, c), ms in sorted(self._draft.cells.items())}}


def bounded(ratio: float) -> float:
    """Of a time to what it should have been, with outliers clamped."""
    return min(OUTLIER, max(1 / OUTLIER, ratio))


def line_weights(places: Sequence[int], at: int) -> list[tuple[int, float]]:
    """Of known places, in ascending order: a straight line between the two nearest, and on along the last one beyond them; constant
    below the first."""
    if not places or at <= places[0] or len(places) == 1:
        return [(place, 1.0) for place in places[:1]]
    i = min(bisect_left(places, at), len(places) - 1)
    low, high = places[i - 1], places[i]
    share = (at - low) / (high - low)
    return [(low, 1.0 - share), (high, share)]


def interpolate(known: Mapping[int, float], at: int) -> float:
    """Along `line_weights`; 0 where nothing is known."""
    return sum((weight * known[place] for place, weight in line_weights(sorted(known), at)), 0.0)
