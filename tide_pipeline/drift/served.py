"""What served steps cost and how far drafts survived in them, added up from the acceptance log. Knows the log; decides nothing.

    cells      milliseconds of a step by batch size and draft length: the median of blocks of steps, as a stall is not what a step costs
    survival   by draft version and position j: steps in which the j-1 tokens before it were accepted, and those in which it was too

A step of b requests is in the log b times: `steps` counts it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tide_pipeline.config import TideConfig
from tide_pipeline.drift.views import read
from tide_pipeline.engine.trtllm.schedule import StepCell

PRIOR_STEPS = 6.0                  # how many observations the rate of the position before is worth
PRIOR_RATE = 0.7                   # of the first position

_FROM = "from acceptance where time >= to_timestamp(floor($since)) and epoch(time) between $since and $until and engine_digest = $engine"
_CELLS = f"""
with sizes as (select unnest($sizes::int[]) as size),
rows as (select draft_length as length, mean_batch_size as batch, duration_ms / num_steps as ms, num_steps as n
         {_FROM} and num_steps > 0 and not is_probe),
padded as (select *, (select min(size) from sizes where size >= round(batch)) as size from rows)
select size, length, median(ms), sum(n / greatest(batch, 1)) from padded where size is not null group by all order by all
"""  # noqa: S608 - values are bound
# Where a draft ended early, position j was tried in fewer steps than accepted the one before it.
_SURVIVAL = f"""
with rows as (select draft_version, time, drafted, accepted, unnest(range(1, len(drafted) + 1)) as j {_FROM} and draft_version <> '')
select draft_version, j, sum(if(j = 1, drafted[1], least(accepted[j - 1], drafted[j]))), sum(accepted[j]), epoch(max(time))
from rows group by draft_version, j order by draft_version, j
"""  # noqa: S608


@dataclass(slots=True)
class Survival:
    """Of one draft version, by position."""

    version: str
    tried: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    newest: float = 0.0                    # Unix seconds of its last row

    @property
    def steps(self) -> int:
        """That drafted at all."""
        return self.tried[0] if self.tried else 0

    def chances(self, longest: int) -> tuple[float, ...]:
        """S[1] .. S[longest]. A position that was hardly tried is as likely as the one before it."""
        out, alive, rate = [], 1.0, PRIOR_RATE
        for j in range(longest):
            tried, kept = (self.tried[j], self.kept[j]) if j < len(self.tried) else (0, 0)
            rate = (kept + PRIOR_STEPS * rate) / (tried + PRIOR_STEPS)
            alive *= rate
            out.append(alive)
        return tuple(out)


def step_cells(config: TideConfig, engine_digest: str, sizes: Sequence[int], since: float, until: float) -> tuple[StepCell, ...]:
    """By draft length and the size that a batch is padded to, between two times in Unix seconds. Larger batches are of a server with
    other settings. Raises LakeError."""
    values = {"since": since, "until": until, "engine": engine_digest, "sizes": list(sizes)}
    return tuple(StepCell(*row) for row in read(config, _CELLS, values, since=since))


def survival(config: TideConfig, engine_digest: str, since: float, until: float) -> list[Survival]:
    """Of every draft that was served between two times, the one that was served last first. Raises LakeError."""
    drafts = dict[str, Survival]()
    values = {"since": since, "until": until, "engine": engine_digest}
    for version, position, tried, kept, newest in read(config, _SURVIVAL, values, since=since):
        draft = drafts.setdefault(version, Survival(version))
        assert position == len(draft.tried) + 1
        draft.tried.append(int(tried))
        draft.kept.append(int(kept))
        draft.newest = max(draft.newest, newest)
    return sorted(drafts.values(), key=lambda draft: (-draft.newest, draft.version))
