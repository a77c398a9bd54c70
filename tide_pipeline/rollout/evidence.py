"""What live traffic says of a rollout: the new draft where it is served, the old one beside it or before it. Decides nothing.

The old draft is measured on the control replicas since the rollout began; with too little of that (a single replica has none beside it)
on the last `drift.recent_s` before; with too little of that too it is the gate's figure. Time per token is compared with control replicas
at the same time; only where the gate left the benchmark to the canary and there are none, with the canary's own last `drift.recent_s`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import ANY_WORKLOAD, Deployment
from tide_pipeline.deployment.builds import read_build
from tide_pipeline.errors import BuildError, GateNotPassed
from tide_pipeline.gate.run import load_verdict
from tide_pipeline.rollout.bake import MIN_SPEED_BLOCKS, Evidence
from tide_pipeline.rollout.history import new_build_of, rest_of, workload_of
from tide_pipeline.rollout.live import LiveLog, LiveRow, Rate, error_rise, rate_of, slowdown, slowdown_since
from tide_pipeline.rollout.sequential import Gap


class Watcher:
    """Evidence of one target's rollouts. What it remembers of the log is a memory of files that never change: losing it loses nothing."""

    def __init__(self, config: TideConfig) -> None:
        self._config, self._log = config, LiveLog(config)
        self._versions: dict[str, str] = {}                # build id -> draft version; a build's name is its digest

    def look(self, latest: Deployment, began_at: float) -> Evidence:
        """`began_at`: when the rollout was opened (Unix seconds)."""
        workload, rest = workload_of(latest), rest_of(latest)
        new_version = self.version_of(new_build_of(latest))
        old_version = self.version_of(rest.get(workload) or rest.get(ANY_WORKLOAD, ""))
        own_tags = {tag for tag in latest.groups["canary"] if tag != ANY_WORKLOAD}
        rows = [row for row in self._log.rows(began_at - self._config.drift.recent_s) if _is_affected(row, workload, own_tags)]
        since = [row for row in rows if row.at >= began_at]
        theirs = [row for row in since if row.replica in latest.canary_replicas]
        new = [row for row in theirs if row.draft_version == new_version]
        control = [row for row in since if row.draft_version == old_version]       # until its step came, each replica was one
        before = [row for row in rows if row.draft_version == old_version]
        old, against = self._old(control, before, new_build_of(latest)) if old_version else (None, "")
        slower, slower_than = slowdown(new, control), "beside it"
        if latest.deferred and (slower is None or slower.n < MIN_SPEED_BLOCKS):
            slower, slower_than = self._slower_than_before(new, before, latest.canary_replicas)
        return Evidence(rate_of(new), old, against, slower, error_rise(new, control), bool(theirs), slower_than=slower_than)

    def version_of(self, build_id: str) -> str:
        """"" for none, or one that is gone."""
        if build_id and build_id not in self._versions:
            with contextlib.suppress(BuildError):
                self._versions[build_id] = read_build(self._config.state.builds, self._config.target, build_id).draft_version
        return self._versions.get(build_id, "")

    def _slower_than_before(self, new: Sequence[LiveRow], before: Sequence[LiveRow], replicas: Sequence[str]) -> tuple[Gap | None, str]:
        own = [row for row in before if row.replica in replicas]
        return slowdown_since(new, own), f"against its own last {self._config.drift.recent_s:.0f} s at the same batch sizes"

    def _old(self, control: Sequence[LiveRow], before: Sequence[LiveRow], new_build: str) -> tuple[Rate | None, str]:
        settings, beside, earlier = self._config.rollout, rate_of(control), rate_of(before)
        if beside.steps >= settings.min_bake_steps and beside.requests >= settings.min_bake_requests:
            return beside, f"on {len({row.replica for row in control})} control replicas"
        if earlier.steps >= settings.min_bake_steps:
            return earlier, f"in the last {self._config.drift.recent_s:.0f} s"
        with contextlib.suppress(GateNotPassed):
            offline = load_verdict(self._config, new_build).doors.get("offline", {}).get("champion_first_position")
            if offline is not None:
                return Rate(float(offline), 0.0, 0), "in the gate"
        return None, ""


def _is_affected(row: LiveRow, workload: str, own_tags: set[str]) -> bool:
    """Whether the row's workload is one whose draft changes."""
    return row.workload == workload if workload != ANY_WORKLOAD else row.workload not in own_tags
