"""What live traffic says of a rollout: the new draft where it is served, the old one beside it or before it. Decides nothing.

The old draft is measured on the control replicas since the rollout began; with too little of that (a single replica has none beside it)
on the last `drift.recent_s` before; with too little of that too it is the gate's figure. Time per token is compared with control replicas
at the same time; only where the gate left the benchmark to the canary and there are none, with the canary's own last `drift.recent_s`.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import ANY_WORKLOAD, Deployment
from tide_pipeline.deployment.builds import read_build
from tide_pipeline.errors import BuildError, GateNotPassed
from tide_pipeline.gate.run import load_verdict
from tide_pipeline.rollout.bake import MIN_SPEED_BLOCKS, Evidence
from tide_pipeline.rollout.history import build_serving, new_build_of, rest_of, workload_of
from tide_pipeline.rollout.live import ByBatch, Rate, Side, Stretches, error_rise, slowdown, slowdown_since
from tide_pipeline.rollout.rows import LiveLog, LiveRow


@dataclass(frozen=True)
class Rollout:
    """Which rows say something of a rollout."""

    began_at: float
    workload: str
    own_tags: frozenset[str]       # workloads with a draft of their own
    new_version: str
    old_version: str
    canaries: frozenset[str]

    def is_affected(self, row: LiveRow) -> bool:
        """Whether the row's workload is one whose draft changes."""
        return row.workload == self.workload if self.workload != ANY_WORKLOAD else row.workload not in self.own_tags


@dataclass
class Tally:
    """The rows of a rollout as sums. `control`: until its step came, each replica was one."""

    rollout: Rollout
    new: Side = field(default_factory=Side)
    control: Side = field(default_factory=Side)
    before: Side = field(default_factory=Side)             # the old draft, before the rollout too
    beside: Stretches = field(default_factory=lambda: Stretches(sides=2))      # new and control at the same time
    alone: ByBatch = field(default_factory=ByBatch)        # the new draft
    own: ByBatch = field(default_factory=ByBatch)          # the old one on what are the canaries now
    answered: set[str] = field(default_factory=set)        # replicas, since it began

    def add(self, row: LiveRow) -> None:
        if not self.rollout.is_affected(row):
            return
        is_old = row.draft_version == self.rollout.old_version
        is_new = row.draft_version == self.rollout.new_version != ""
        if is_old:
            self.before.add(row)
            if row.replica in self.rollout.canaries:
                self.own.add(row)
        if row.at < self.rollout.began_at:
            return
        self.answered.add(row.replica)
        if is_old:
            self.control.add(row)
            self.beside.add(row, side=1)
        if is_new:
            self.new.add(row)
            self.beside.add(row, side=0)
            self.alone.add(row)


class Watcher:
    """Evidence of one target's rollouts. What it remembers are sums over files that never change: losing them loses nothing."""

    def __init__(self, config: TideConfig) -> None:
        self._config = config
        self._rollout: Rollout | None = None
        self._log: LiveLog[Tally] | None = None
        self._versions: dict[str, str] = {}                # build id -> draft version; a build's name is its digest
        self._lock = threading.Lock()                      # Dagster gives up a slow tick, begins another, and lets the first one go on

    def look(self, latest: Deployment, began_at: float) -> Evidence:
        """`began_at`: when the rollout was opened (Unix seconds). Raises LakeError."""
        rollout = self._rollout_of(latest, began_at)
        with self._lock:
            if self._log is None or rollout != self._rollout:
                self._rollout, self._log = rollout, LiveLog(self._config, began_at - self._config.drift.recent_s, lambda: Tally(rollout))
            tally = self._log.sums()
            old, against = self._old(tally, new_build_of(latest)) if rollout.old_version else (None, "")
            slower, slower_than = slowdown(tally.beside), "beside it"
            if latest.deferred and (slower is None or slower.n < MIN_SPEED_BLOCKS):
                slower = slowdown_since(tally.alone, tally.own)
                slower_than = f"against its own last {self._config.drift.recent_s:.0f} s at the same batch sizes"
            return Evidence(tally.new.rate(), old, against, slower, error_rise(tally.new, tally.control),
                            not tally.answered.isdisjoint(latest.canary_replicas), slower_than=slower_than)

    def forget(self) -> None:
        """The sums, once no rollout is under way."""
        with self._lock:
            self._rollout = self._log = None

    def version_of(self, build_id: str) -> str:
        """"" for none, or one that is gone."""
        if build_id and build_id not in self._versions:
            with contextlib.suppress(BuildError):
                self._versions[build_id] = read_build(self._config.state.builds, self._config.target, build_id).draft_version
        return self._versions.get(build_id, "")

    def _rollout_of(self, latest: Deployment, began_at: float) -> Rollout:
        workload, rest = workload_of(latest), rest_of(latest)
        return Rollout(began_at, workload, frozenset(latest.groups["canary"]) - {ANY_WORKLOAD}, self.version_of(new_build_of(latest)),
                       self.version_of(build_serving(rest, workload)), frozenset(latest.canary_replicas))

    def _old(self, tally: Tally, new_build: str) -> tuple[Rate | None, str]:
        settings, beside, earlier = self._config.rollout, tally.control.rate(), tally.before.rate()
        if beside.steps >= settings.min_bake_steps and beside.requests >= settings.min_bake_requests:
            return beside, f"on {len(tally.control.replicas)} control replicas"
        if earlier.steps >= settings.min_bake_steps:
            return earlier, f"in the last {self._config.drift.recent_s:.0f} s"
        with contextlib.suppress(GateNotPassed):
            offline = load_verdict(self._config, new_build).doors.get("offline", {}).get("champion_first_position")
            if offline is not None:
                return Rate(float(offline), 0.0, 0), "in the gate"
        return None, ""
