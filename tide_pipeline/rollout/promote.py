"""Bring a build to live traffic: canary, bake, then every replica. Knows the record and what replicas report; loads no draft.

    stable n   rest = old
    canary n+1 rest = old, canary = new for one replica        bake on live traffic
    stable n+2 rest = new                                      or rolled_back n+2, rest = old, with the reason
Killed anywhere, the last record stands: the same call goes on with its canary, `rollback` ends it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import ANY_WORKLOAD, Deployment, EngineBuild, GateVerdict
from tide_pipeline.deployment.builds import load_build
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.errors import BuildError, DeploymentConflict, GateNotPassed
from tide_pipeline.gate.judge import DOORS
from tide_pipeline.rollout.history import CANARY, STABLE, decide_and_append, next_n, rest_of
from tide_pipeline.rollout.replicas import find_replicas, live_replicas, wait_until_served
from tide_pipeline.rollout.undo import restoring
from tide_pipeline.rollout.watch import Watch

Report = Callable[[str], None]


def promote(config: TideConfig, build: EngineBuild, verdict: GateVerdict, *, workload: str = ANY_WORKLOAD, who: str, reason: str,
            progress: Report = lambda text: None) -> Deployment:
    """Serve `build` for `workload`. Returns the record that stands afterwards: stage "stable", or "rolled_back" with why.

    Raises:
        GateNotPassed: the verdict does not open every door, is of another draft, or the build's bytes changed since.
        DeploymentConflict: another rollout of this target is under way, or took over from this one.
    """
    check_verdict(config, build, verdict)
    return _Rollout(config, build, verdict, workload, who, reason, progress).run()


def check_verdict(config: TideConfig, build: EngineBuild, verdict: GateVerdict) -> None:
    """Ask the gate again at the door; a verdict that only says "passed" opens nothing."""
    closed = [name for name in DOORS if verdict.doors.get(name, {}).get("passed") is not True]
    if closed or not verdict.passed:
        raise GateNotPassed(f"{build.draft_version} did not pass the gate ({', '.join(closed) or 'no verdict'}): {verdict.reasons}")
    if verdict.challenger_digest != build.draft_digest:
        raise GateNotPassed(f"the verdict is about draft {verdict.challenger_digest[:12]}, build {build.build_id} holds "
                            f"{build.draft_digest[:12]}: run `tide gate` on this build")
    try:
        found = load_build(config.state.builds, config.target, build.build_id)
    except BuildError as error:
        raise GateNotPassed(f"what passed the gate is no longer there: {error}") from error
    if found.draft_digest != build.draft_digest:
        raise GateNotPassed(f"build {build.build_id} on disk is another draft than the one that was judged: run `tide gate` again")


class _Rollout:
    """One rollout of one build."""

    def __init__(self, config: TideConfig, build: EngineBuild, verdict: GateVerdict, workload: str, who: str, reason: str,
                 progress: Report) -> None:
        self.config, self.build, self.verdict, self.workload = config, build, verdict, workload
        self.who, self.reason, self.progress = who, reason, progress
        self.record = DeploymentRecord(config.state.deployments, config.target)

    def run(self) -> Deployment:
        begun = decide_and_append(self.record, self._begin)
        if begun.stage != CANARY:                                      # served already, or nobody there to watch
            return begun
        self.progress(f"canary: waiting for {', '.join(begun.canary_replicas)} to serve {self.build.draft_version}")
        trouble = wait_until_served(self.config, begun, self.build, begun.canary_replicas)
        if trouble:
            return self._undo(begun, begun, trouble)
        watch = Watch(self.config, self.record, begun, self.build, self.verdict, self.workload)
        baked = watch.bake(self.progress)
        if baked.trouble:
            return self._undo(begun, begun, baked.reason)
        stable = decide_and_append(self.record, lambda latest: self._settle(latest, begun, baked.reason))
        self.progress(f"stable: waiting for every replica to serve {self.build.draft_version}")
        trouble = wait_until_served(self.config, stable, self.build, live_replicas(self.config))
        return self._undo(stable, begun, trouble) if trouble else stable

    def _begin(self, latest: Deployment | None) -> Deployment:
        """The canary record: a new one, or the one that a killed rollout of this build left."""
        if latest is not None and latest.stage == CANARY:
            is_ours = latest.groups["canary"].get(self.workload) == self.build.build_id
            if is_ours and set(latest.canary_replicas) <= set(live_replicas(self.config)):
                return latest
            if not is_ours and time.time() - latest.created_at < self._longest_s():
                raise DeploymentConflict(f"deployment {latest.n} by {latest.who} is under way ({latest.reason}): "
                                         "try again when it has ended, or end it with `tide rollback`")
        old = rest_of(latest)
        new = {**old, self.workload: self.build.build_id}
        if latest is not None and new == old and latest.stage != CANARY:
            return latest
        replicas = find_replicas(self.config)
        if not replicas:
            return self._next(latest, {"rest": new}, (), STABLE, "no replica was live, so nothing was watched")
        canary = replicas[0]
        return self._next(latest, {"rest": old, "canary": new}, (canary,), CANARY, f"canary on {canary} of {len(replicas)}")

    def _settle(self, latest: Deployment | None, begun: Deployment, why: str) -> Deployment:
        """Every replica serves the new draft. Raises DeploymentConflict when the canary is not what is wanted any more."""
        if latest is None or latest.n != begun.n:
            raise DeploymentConflict(f"deployment {begun.n} was replaced while it baked: {latest.reason if latest else 'no record'}")
        return self._next(latest, {"rest": begun.groups["canary"]}, (), STABLE, why)

    def _undo(self, failed: Deployment, begun: Deployment, why: str) -> Deployment:
        """Restore what was served before; somebody else's later record stands."""
        self.progress(f"rolling back: {why}")

        def decide(latest: Deployment | None) -> Deployment:
            if latest is not None and latest.n != failed.n:
                return latest
            return restoring(self.config.target, latest, rest_of(begun), self.who, f"{self.build.draft_version} rolled back: {why}")

        return decide_and_append(self.record, decide)

    def _next(self, latest: Deployment | None, groups: dict[str, dict[str, str]], canaries: tuple[str, ...], stage: str,
              why: str) -> Deployment:
        text = f"{self.reason}; {self.build.draft_version} for {self.workload!r}: {why}"
        return Deployment(next_n(latest), self.config.target, groups, canaries, stage, self.who, text, time.time())

    def _longest_s(self) -> float:
        """A canary older than this has nobody who drives it."""
        return 2 * self.config.rollout.max_bake_s + self.config.rollout.heartbeat_s
