"""Where the time between a drift and the new draft went. Pure: times in, seconds of each stage out.

    collect    from the verdict "drifted" until enough was captured (a run is asked for some seconds before); 0 where a person asked
    start      until the trainer was started: the sensor's tick, Dagster's queue, the run's process; 0 where all that was over by then
    train, register, build, gate
    bake       the canary on live traffic: as long as the settings say
    roll out   the rest until the last replica was told, waits between the steps included
Detection, which comes before, can't be seen from here: no one knows which request was the first of the shifted ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from tide_pipeline.contracts import Deployment
from tide_pipeline.rollout.history import CANARY, began_of

DRIFTED, ASKED, BEGUN, TRAINED, REGISTERED, BUILT, JUDGED = "drifted", "asked", "begun", "trained", "registered", "built", "judged"
COLLECTED = "collected"            # worked out afterwards; without a drift it is when the run was asked for
STAGES = (("collect", DRIFTED, COLLECTED), ("start", COLLECTED, BEGUN), ("train", BEGUN, TRAINED), ("register", TRAINED, REGISTERED),
          ("build", REGISTERED, BUILT), ("gate", BUILT, JUDGED))


def split(marks: Mapping[str, float], history: Sequence[Deployment], end: Deployment) -> dict[str, float]:
    """Seconds by stage. `marks`: when each was reached (Unix seconds); a stage without both of its ends is left out.

    `history`: the deployment record; `end`: the one that ended the rollout.
    """
    marks = {COLLECTED: marks[ASKED], **marks} if ASKED in marks else marks
    found = {stage: marks[b] - marks[a] for stage, a, b in STAGES if a in marks and b in marks}
    rollout = [deployment for deployment in history if began_of(deployment) == began_of(end) and deployment.n <= end.n]
    baked = next((b.created_at - a.created_at for a, b in itertools.pairwise(rollout) if a.stage == CANARY), 0.0)
    found["bake"] = baked
    if JUDGED in marks:
        found["roll out"] = end.created_at - marks[JUDGED] - baked
    return {stage: round(max(0.0, seconds), 1) for stage, seconds in found.items()}


def without_waiting(stages: Mapping[str, float]) -> float:
    """Seconds of everything but what is as long as its settings say: collecting, training, the bake."""
    return round(sum(seconds for stage, seconds in stages.items() if stage not in ("collect", "train", "bake")), 1)
