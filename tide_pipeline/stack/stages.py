"""Where the time between a shift and the new draft went, as the pipeline itself tells it (defs/split.py). Measures nothing."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from tide_pipeline.stack.runs import RunView

ORDER = ("detect", "collect", "start", "train", "register", "build", "gate", "bake", "roll out")
DRIFTED_AT = "tide/drifted_at"     # tag of a run that the drift sensor asked for: when it was judged, Unix seconds


def detection_of(run: RunView | None, shifted_at: float) -> dict[str, float]:
    """Seconds from the first shifted request to the verdict, and from there to the run; {} for a run that a person asked for.

    Only who sends the traffic knows when that request was.
    """
    if run is None or DRIFTED_AT not in run.tags:
        return {}
    drifted_at = max(float(run.tags[DRIFTED_AT]), shifted_at)
    return {"detect": drifted_at - shifted_at, "collect": run.created - drifted_at}


def in_order(stages: dict[str, float]) -> dict[str, float]:
    """As they follow each other, whenever each was heard of."""
    return {stage: stages[stage] for stage in sorted(stages, key=lambda s: ORDER.index(s) if s in ORDER else len(ORDER))}


def stages_of(run: RunView | None, training: Path, shifted_at: float = 0.0) -> dict[str, float]:
    """Seconds by stage of a run whose draft is live, the bake apart; {} where it left none. Collecting begins with the shift."""
    with contextlib.suppress(OSError, ValueError):
        if run is not None:
            found: dict[str, float] = json.loads((training / run.run_id / "stages.json").read_text())
            if "collect" in found:
                found["collect"] -= max(0.0, shifted_at - float(run.tags.get(DRIFTED_AT, shifted_at)))
            return {stage: float(seconds) for stage, seconds in found.items()}
    return {}
