"""What a step costs: measured times of drafting and of verifying, with the machine's load divided out. Knows no network, no requests.

    T_step = load * (draft_ms(members, depth) + verify_ms(batch, rows))          rows = batch + tokens to verify

both at the longest context of the step: attention reads every cached position of every request, and at batch 16 that is half of a step.
The tables are filled by a profile of the idle engine and refreshed by the steps that are served. A busy machine slows every step alike:
that is the load, one number for all cells, which a choice between depths need not know. So a cell that was not visited for long stays
comparable with one that was. Times between measured cells are interpolated.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

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
        self._contexts = sorted({context for _, _, context in self.cells}) or [0]
        self._curves: dict[tuple[int, int], list[float]] = {}      # (members or batch, context / stride) -> ms by depth or rows
        self._folded = 0

    def ms(self, x: int, y: int, context: int) -> float:
        at = context // CONTEXT_STRIDE
        curve = self._curves.get((x, at))
        if curve is None:
            curve = self._curves[(x, at)] = []
        while len(curve) <= y:
            curve.append(self._between(x, len(curve), at * CONTEXT_STRIDE))
        return curve[y]

    def add(self, x: int, y: int, ms: float) -> None:
        """Without a profile the first time that is seen counts, for all contexts."""
        self.cells.setdefault((x, y, 0), ms)
        self._curves.clear()

    def fold(self, x: int, y: int, context: int, ratio: float) -> None:
        """Let the cells before and after this context follow a time that was `ratio` times the expected one, the nearer one more."""
        excess = CELL_WEIGHT * (min(OUTLIER, max(1 / OUTLIER, ratio)) - 1.0)
        i = min(max(1, bisect_left(self._contexts, context)), len(self._contexts) - 1)
        low, high = self._contexts[i - 1], self._contexts[i]
        share = min(1.0, max(0.0, (context - low) / (high - low))) if high > low else 1.0
        for c, weight in ((low, 1.0 - share), (high, share)):
            if (x, y, c) in self.cells:
                self.cells[(x, y, c)] *= 1.0 + weight * excess
        self._folded += 1
        if self._folded % REFRESH_STEPS == 0:
            self._curves.clear()

    def _between(self, x: int, y: int, context: int) -> float:
        """Along y at the nearest measured x, then between these, then between contexts."""
        known: dict[int, dict[int, dict[int, float]]] = {}
        for (a, b, c), ms in self.cells.items():
            known.setdefault(c, {}).setdefault(a, {})[b] = ms
        return interpolate({c: interpolate({a: interpolate(line, y) for a, line in by_x.items()}, x) for c, by_x in known.items()}, context)


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
        ratio = min(OUTLIER, max(1 / OUTLIER, (verify_ms + draft_ms) / (should_verify + should_draft)))
        self.load += LOAD_WEIGHT * (ratio - self.load)
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


def interpolate(known: dict[int, float], at: int) -> float:
    """In a straight line between the nearest known places, and on along the last line beyond them; constant below the first,
    0 where nothing is known."""
    places = sorted(known)
    if not places:
        return 0.0
    if at in known or len(places) == 1 or at < places[0]:
        return known[at] if at in known else known[places[0]]
    i = min(bisect_left(places, at), len(places) - 1)
    low, high = places[i - 1], places[i]
    return known[low] + (known[high] - known[low]) * (at - low) / (high - low)
