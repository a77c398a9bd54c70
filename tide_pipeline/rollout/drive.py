"""Advance a rollout by at most one record. Knows the record, observed state and the log; keeps nothing, so anyone may call it, any time.

    Driver.advance()       one look, one decision, at most one record: a sensor, a cron line, a person
    Driver.drive(n)        again and again until the rollout that record n opened has ended
Two that advance at once write the same next number: one of them loses, and looks again the next time.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import Deployment
from tide_pipeline.deployment.builds import read_build
from tide_pipeline.deployment.record import DeploymentRecord, read_observed
from tide_pipeline.errors import BuildError, DeploymentConflict, LakeError
from tide_pipeline.rollout.bake import Evidence
from tide_pipeline.rollout.evidence import Watcher
from tide_pipeline.rollout.history import began_of, is_under_way, new_build_of, workload_of
from tide_pipeline.rollout.live import Rate
from tide_pipeline.rollout.plan import Action, Kind, Sight, next_action, record_of

POLL_S = 0.5
TELL_S = 3.0                       # what differs in its numbers alone is told this often
NUMBER = re.compile(r"[-+]?[0-9.]+")
Report = Callable[[str], None]


@dataclass(frozen=True)
class Advanced:
    """One look: what stands now, what was to be done, and whether a record was written."""

    deployment: Deployment | None
    action: Action
    wrote: bool = False


class Driver:
    """`advance` as often as you like; a driver that is kept reads each shard of the log once and keeps sums of it."""

    def __init__(self, config: TideConfig, who: str) -> None:
        self.config, self.who = config, who
        self.record = DeploymentRecord(config.state.deployments, config.target)
        self._watcher = Watcher(config)

    def look(self, latest: Deployment | None) -> Action:
        """What would be done now; writes nothing."""
        return next_action(latest, self._sight(latest), self.config.rollout)

    def advance(self) -> Advanced:
        latest = self.record.latest()
        action = self.look(latest)
        wanted = record_of(action, latest, self.who, self._title(latest)) if latest is not None else None
        if wanted is None:
            return Advanced(latest, action)
        try:
            return Advanced(self.record.append(wanted), action, wrote=True)
        except DeploymentConflict:
            return Advanced(self.record.latest(), Action(Kind.WAIT, "somebody else wrote first: looking again"))

    def drive(self, n: int, progress: Report = lambda text: None) -> Deployment:
        """Until the rollout opened by record n is over. Returns the record that ended it.

        Raises:
            DeploymentConflict: it was ended by somebody (rollback, abort, another rollout), with their reason.
        """
        told, due = "", 0.0
        while True:
            advanced = self.advance()
            latest, action = advanced.deployment, advanced.action
            words = NUMBER.sub("", action.reason)
            if advanced.wrote or words != told or time.monotonic() >= due:
                progress(f"{action.kind}: {action.reason}" if advanced.wrote else action.reason)
                told, due = words, time.monotonic() + TELL_S
            if latest is None or not is_under_way(latest) or began_of(latest) != n:
                return self._end_of(n)
            time.sleep(POLL_S)

    def _end_of(self, n: int) -> Deployment:
        """The record that ended rollout n. Raises DeploymentConflict when that was not the rollout itself."""
        ends = (deployment for deployment in self.record.history() if deployment.n > n and not (
            is_under_way(deployment) and began_of(deployment) == n))
        end = next(ends, None)
        if end is None:
            raise DeploymentConflict(f"deployment {n} is no longer in the record: was the state directory changed?")
        if began_of(end) != n:
            raise DeploymentConflict(f"deployment {n} was replaced while it was rolled out: {end.reason}")
        return end

    def _sight(self, latest: Deployment | None) -> Sight:
        config, now = self.config, time.time()
        if latest is None or not is_under_way(latest):
            self._watcher.forget()
            return Sight({}, {}, Evidence(Rate(0.0, 0.0, 0)), now)
        builds = {build_id for group in latest.groups.values() for build_id in group.values()}
        try:
            evidence = self._watcher.look(latest, self.record.read(began_of(latest)).created_at)
        except LakeError as error:                         # a replica in trouble still takes the draft back
            evidence = Evidence(Rate(0.0, 0.0, 0), error=str(error))
        return Sight(read_observed(config.state.observed, config.target), self._digests(builds), evidence, now)

    def _digests(self, builds: set[str]) -> dict[str, str]:
        found = {}
        for build_id in builds:
            with contextlib.suppress(BuildError):          # a replica will say so, if it matters
                found[build_id] = read_build(self.config.state.builds, self.config.target, build_id).draft_digest
        return found

    def _title(self, latest: Deployment | None) -> str:
        """Of the records of a rollout: the draft, for which workload, and why it was opened."""
        if latest is None or not is_under_way(latest):
            return ""
        build_id = new_build_of(latest)
        why = self.record.read(began_of(latest)).reason.partition("; ")[0]
        return f"{why}; {self._watcher.version_of(build_id) or build_id} for {workload_of(latest)!r}"
