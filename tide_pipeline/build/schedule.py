"""The draft lengths that paid, learned from what was served: made again with every build. Knows the log's sums; renders nothing.

Step times are the engine's whatever draft it had; survival is the draft's own once it has been served, before that of the one served last.
Nothing that was measured elsewhere goes in: an engine on other GPUs has another lake, or another state directory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from tide_pipeline.config import TideConfig
from tide_pipeline.drift.served import Survival, step_cells, survival
from tide_pipeline.engine.memory import graph_batches
from tide_pipeline.engine.trtllm.options import draft_length
from tide_pipeline.engine.trtllm.schedule import StepCell, StepMs, as_schedule, best_lengths, break_even, fit_steps, rate
from tide_pipeline.engine_spec import EngineSpec
from tide_pipeline.errors import NotEnoughSignals
from tide_pipeline.models.target import engine_digest

DRAFTS_S = 24 * 3600.0                 # that is looked back for survival: it changes with the draft and with what is asked
COSTS_S = 30 * DRAFTS_S                # and for step times: they stay, and a falling schedule hides what other lengths cost
MIN_CELL_STEPS = 20                    # of a batch size and draft length; with fewer it is left out
NEAR_LARGEST = 4                       # a batch size this many times smaller than the largest still tells what a large batch costs
MIN_DRAFTED = 500                      # drafted steps before a draft's survival is believed


@dataclass(frozen=True, slots=True)
class LengthRow:
    """One batch size that has a CUDA graph: expected tokens/s without drafts, with the longest ones, and with what is best."""

    batch: int
    length: int
    plain: float
    longest: float
    best: float


@dataclass(frozen=True, slots=True)
class LearnedSchedule:
    """What was learned, and from what."""

    schedule: dict[int, int]           # {largest batch: length}
    rows: tuple[LengthRow, ...]
    best_until: int                    # the largest batch at which any drafting pays: for the front, where lengths can't follow the batch
    draft_version: str                 # whose survival it is
    is_own: bool                       # of the draft that is built
    chances: tuple[float, ...]
    drafted_steps: int
    cells: tuple[StepCell, ...]
    drafts_since: float
    costs_since: float
    until: float
    engine_digest: str

    def origin(self) -> dict[str, Any]:
        """For a birth certificate."""
        return {"log": "acceptance", "engine_digest": self.engine_digest, "step_ms_since": _utc(self.costs_since),
                "survival_since": _utc(self.drafts_since), "until": _utc(self.until), "survival_of": self.draft_version,
                "is_own": self.is_own, "drafted_steps": self.drafted_steps, "chances": [round(chance, 4) for chance in self.chances],
                "best_until": self.best_until,
                "step_ms": {f"b{cell.batch}k{cell.length}": [round(cell.ms, 3), round(cell.steps)] for cell in self.cells}}


def learn_schedule(config: TideConfig, spec: EngineSpec, until: float, *, version: str = "", since: float | None = None) -> LearnedSchedule:
    """For a draft `version`, or the one that was served last, from the log up to `until` (Unix seconds).

    Raises:
        NotEnoughSignals: too few steps, or of one draft length only: says what to serve with.
        LakeError: the lake can't be read.
    """
    longest, sizes = draft_length(spec, config), graph_batches(config.serve.max_batch)
    digest = engine_digest(config.engine_dir / spec.model, spec)
    drafts_since, costs_since = (until - DRAFTS_S, until - COSTS_S) if since is None else (since, since)
    cells = tuple(cell for cell in step_cells(config, digest, sizes, costs_since, until) if cell.steps >= MIN_CELL_STEPS)
    draft = _whose(survival(config, digest, drafts_since, until), version)
    if not told_apart(cells):
        raise NotEnoughSignals(_what_to_serve(cells, longest, sizes[-1], costs_since))
    if draft is None:
        raise NotEnoughSignals(f"no draft was served {MIN_DRAFTED} drafted steps since {_utc(drafts_since)}: serve more, or look further "
                               "back with --since")
    step_ms = fit_steps(cells)
    chances = draft.chances(longest)
    lengths_by_batch = best_lengths(step_ms, chances, sizes)
    return LearnedSchedule(as_schedule(lengths_by_batch), tuple(_rows(step_ms, chances, lengths_by_batch)),
                           break_even(step_ms, chances, config.serve.max_batch), draft.version, draft.version == version, chances,
                           draft.steps, cells, drafts_since, costs_since, until, digest)


def told_apart(cells: tuple[StepCell, ...]) -> bool:
    """Whether what a row costs can be told from what a request costs: two lengths at a large batch size, and at a small one."""
    lengths = dict[int, set[int]]()
    for cell in cells:
        lengths.setdefault(cell.batch, set()).add(cell.length)
    both = [batch for batch, found in lengths.items() if len(found) > 1]
    return len(both) > 1 and max(both) * NEAR_LARGEST >= max(lengths)


def _what_to_serve(cells: tuple[StepCell, ...], longest: int, max_batch: int, since: float) -> str:
    lengths = sorted({cell.length for cell in cells})
    other = f"speculation.draft_schedule = [[{max_batch}, 1]]" if longest in lengths or not lengths else "no speculation.draft_schedule"
    return (f"since {_utc(since)} {len(cells)} pairs of batch size and draft length were served {MIN_CELL_STEPS} steps or more, lengths "
            f"{lengths} at sizes {sorted({cell.batch for cell in cells})}: it takes two lengths at the same sizes, small and large. Serve "
            f"a while with {other}" + ("" if lengths else ", and a while without") + ", or look further back with --since")


def _whose(drafts: Iterable[Survival], version: str) -> Survival | None:
    enough = [draft for draft in drafts if draft.steps >= MIN_DRAFTED]
    return next((draft for draft in enough if draft.version == version), enough[0] if enough else None)


def _rows(step_ms: StepMs, chances: tuple[float, ...], lengths: dict[int, int]) -> Iterable[LengthRow]:
    for batch, length in lengths.items():
        yield LengthRow(batch, length, *(1e3 * rate(step_ms, chances, batch, k) for k in (0, len(chances), length)))


def _utc(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%MZ")
