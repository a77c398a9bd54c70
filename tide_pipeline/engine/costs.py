"""What a step costs: measured times of drafting and of verifying, with the machine's load divided out. Knows no network, no requests.

    T_step = load * (draft_ms(members, depth) + verify_ms(batch, rows))          rows = batch + tokens to verify

Both tables are filled by a profile of the idle engine and refreshed by the steps that are served. A busy machine slows every step alike:
that is the load, one number for all cells, which a choice between depths need not know. So a cell that was not visited for long stays
comparable with one that was. Times between measured cells are interpolated.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

LOAD_WEIGHT = 0.25               # of the newest step, in the load
CELL_WEIGHT = 0.01               # and in its own cell: slow, as it is relative to all others
OUTLIER = 2.0                    # a step is taken for at most this many times what it should have taken


class StepCosts:
    """Times in ms on an idle machine, by cell. Without a profile the first steps that are served take its place."""

    def __init__(self) -> None:
        self.load = 1.0
        self.is_profiled = False
        self._draft: dict[tuple[int, int], float] = {}           # (members, depth)
        self._verify: dict[tuple[int, int], float] = {}          # (batch, rows)
        self._curves: dict[int, list[float]] = {}                # batch -> verify_ms by rows, until the next profile

    def profile(self, draft: Mapping[tuple[int, int], float], verify: Mapping[tuple[int, int], float]) -> None:
        """Set what is known: ms by (members, depth) and by (batch, rows)."""
        self._draft, self._verify, self.load, self.is_profiled = dict(draft), dict(verify), 1.0, True
        self._curves.clear()

    def observe(self, batch: int, rows: int, verify_ms: float, members: int, depth: int, draft_ms: float) -> None:
        """Fold in one served step; depth 0 is a step without drafting."""
        if not self.is_profiled:
            self._verify.setdefault((batch, rows), verify_ms)
            if depth:
                self._draft.setdefault((members, depth), draft_ms)
            self._curves.clear()
            return
        expected = self.verify_ms(batch, rows) + self.draft_ms(members, depth)
        ratio = min(OUTLIER, max(1 / OUTLIER, (verify_ms + draft_ms) / expected))
        self.load += LOAD_WEIGHT * (ratio - self.load)
        self._fold(self._verify, (batch, rows), verify_ms / self.load)
        if depth:
            self._fold(self._draft, (members, depth), draft_ms / self.load)

    def draft_ms(self, members: int, depth: int) -> float:
        """Of drafting `depth` tokens for each of `members` requests. 0 at depth 0."""
        if depth == 0:
            return 0.0
        cell = self._draft.get((members, depth))
        return cell if cell is not None else interpolate({m: ms for (m, d), ms in self._draft.items() if d == depth}, members)

    def verify_ms(self, batch: int, rows: int) -> float:
        """Of one pass of the target over `rows` rows of `batch` requests, with everything that is not drafting."""
        cell = self._verify.get((batch, rows))
        if cell is not None:
            return cell
        curve = self._curves.get(batch)
        if curve is None:
            curve = self._curves[batch] = []
        while len(curve) <= rows:
            curve.append(self._between(batch, len(curve)))
        return curve[rows]

    def table(self) -> dict[str, float]:
        """"b<batch>n<rows>" and "m<members>k<depth>" -> ms."""
        return {**{f"b{b}n{n}": round(ms, 3) for (b, n), ms in sorted(self._verify.items())},
                **{f"m{m}k{d}": round(ms, 3) for (m, d), ms in sorted(self._draft.items())}}

    def _between(self, batch: int, rows: int) -> float:
        """Along the rows of the nearest measured batches, then between these."""
        by_batch: dict[int, dict[int, float]] = {}
        for (b, n), ms in self._verify.items():
            by_batch.setdefault(b, {})[n] = ms
        return interpolate({b: interpolate(curve, rows) for b, curve in by_batch.items()}, batch)

    @staticmethod
    def _fold(table: dict[tuple[int, int], float], cell: tuple[int, int], ms: float) -> None:
        known = table.get(cell)
        if known is not None:
            table[cell] = known + CELL_WEIGHT * (min(max(ms, known / OUTLIER), known * OUTLIER) - known)


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
