"""Watch a canary on live traffic until its bake is decided. Knows the acceptance log and observed state; writes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import ANY_WORKLOAD, Deployment, EngineBuild, GateVerdict
from tide_pipeline.deployment.builds import load_build
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.errors import BuildError, DeploymentConflict
from tide_pipeline.rollout.bake import BakeVerdict, Decision, judge_bake
from tide_pipeline.rollout.live import LiveRow, Rate, rate_of, read_live
from tide_pipeline.rollout.replicas import live_replicas

POLL_S = 0.5


@dataclass(frozen=True)
class Baked:
    """How the bake ended: `trouble` sends the draft back."""

    trouble: bool
    reason: str


class Watch:
    """The canary's steps with the new draft, against every replica's recent steps with the one it replaces."""

    def __init__(self, config: TideConfig, record: DeploymentRecord, canary: Deployment, build: EngineBuild, verdict: GateVerdict,
                 workload: str) -> None:
        self.config, self.record, self.canary, self.build, self.verdict, self.workload = config, record, canary, build, verdict, workload
        self.own_tags = {tag for tag in canary.groups["canary"] if tag != ANY_WORKLOAD}
        self.old_version = self._old_version()
        self.began = time.time()

    def bake(self, progress: Callable[[str], None]) -> Baked:
        """Blocks for `bake_s` at least and `max_bake_s` at most. Raises DeploymentConflict when another record took over."""
        settings = self.config.rollout
        while True:
            time.sleep(POLL_S)
            elapsed = time.time() - self.began
            self._check_still_ours()
            states = live_replicas(self.config)
            if gone := [name for name in self.canary.canary_replicas if name not in states]:
                return Baked(True, f"canary {', '.join(gone)} stopped reporting during the bake")
            rows = read_live(self.config, self.canary.created_at - self.config.drift.recent_s)
            verdict = self._judge(rows, time_is_up=elapsed >= settings.max_bake_s)
            progress(f"bake {elapsed:.0f} s: {verdict.reason}")
            if verdict.decision is Decision.WORSE:
                return Baked(True, verdict.reason)
            if verdict.decision is Decision.FINE and elapsed >= settings.bake_s:
                return Baked(False, verdict.reason)
            speed = sum(states[name].tokens_per_s for name in self.canary.canary_replicas)
            if elapsed >= settings.bake_s + 2 * self.config.capture.flush_s and speed <= 0 and not self._traffic(rows):
                return Baked(False, "no traffic during the bake, so nothing was compared")

    def _judge(self, rows: list[LiveRow], *, time_is_up: bool) -> BakeVerdict:
        canary = rate_of(rows, lambda r: r.draft_version == self.build.draft_version and self._on_canary(r) and self._affected(r))
        return judge_bake(self._baseline(rows), canary, self.config.rollout, time_is_up=time_is_up)

    def _baseline(self, rows: list[LiveRow]) -> Rate | None:
        """The old draft on live traffic of the last `drift.recent_s`; with too little of that, the gate's figure for it."""
        if not self.old_version:
            return None
        live = rate_of(rows, lambda r: r.draft_version == self.old_version and self._affected(r))
        if live.steps >= self.config.rollout.min_bake_steps:
            return live
        offline = self.verdict.doors["offline"].get("champion_first_position")
        return Rate(float(offline), 0.0, 0) if offline is not None else None

    def _affected(self, row: LiveRow) -> bool:
        """Whether the row's workload is one whose draft changes."""
        return row.workload == self.workload if self.workload != ANY_WORKLOAD else row.workload not in self.own_tags

    def _on_canary(self, row: LiveRow) -> bool:
        return row.replica in self.canary.canary_replicas and row.at >= self.canary.created_at

    def _traffic(self, rows: list[LiveRow]) -> bool:
        return any(row.at >= self.began and row.replica in self.canary.canary_replicas for row in rows)

    def _check_still_ours(self) -> None:
        latest = self.record.latest()
        if latest is None or latest.n != self.canary.n:
            raise DeploymentConflict(f"deployment {self.canary.n} was replaced while it baked: {latest.reason if latest else 'no record'}")

    def _old_version(self) -> str:
        """"" when nothing was served before, or its build is gone."""
        rest = self.canary.groups["rest"]
        build_id = rest.get(self.workload) or rest.get(ANY_WORKLOAD)
        if build_id is None:
            return ""
        try:
            return load_build(self.config.state.builds, self.config.target, build_id).draft_version
        except BuildError:
            return ""
