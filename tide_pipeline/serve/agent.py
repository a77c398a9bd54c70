"""The draft agent: makes one engine serve what the deployment record says, and reports what it serves. Knows no Triton and no MLflow.

Replicas pull: nothing can push a draft into this process. A build that is missing, altered or malformed changes nothing but the
report's `error`; it is tried again after a pause, and at once when the record moves on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time

import torch

from tide_pipeline.capture.recorder import Recorder
from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import Deployment, EngineBuild, ObservedState
from tide_pipeline.deployment.builds import load_build
from tide_pipeline.deployment.record import DeploymentRecord, read_replica, write_observed
from tide_pipeline.deployment.since import Since, served_since
from tide_pipeline.engine.protocol import Engine
from tide_pipeline.errors import DigestMismatch, RestartNeeded
from tide_pipeline.serve.tally import Counts, Recent, TallySink

log = logging.getLogger(__name__)

RETRY_S = 5.0                      # after a build that could not be served
RECENT_S = 10.0                    # reported acceptance and throughput look back this far


class DraftAgent:
    """`poll()` once before readiness, then `start()`. Only one thread polls at a time."""

    def __init__(self, engine: Engine, recorder: Recorder, tally: TallySink, config: TideConfig, replica: str) -> None:
        self._engine, self._recorder, self._config, self.replica = engine, recorder, config, replica
        self._record = DeploymentRecord(config.state.deployments, config.target)
        self._applied = 0                          # number of the deployment being served
        self._serving: dict[str, EngineBuild] = {}
        self._serving_since = 0.0                  # of the first report of it: a server that still warms up serves nobody
        self._failed, self._retry_at = 0, 0.0      # number of the deployment that could not be served
        self._needs_restart = 0                    # number of a deployment that this process can't change to
        self.since: dict[str, Since] = {}          # of what is served, by workload tag
        self.desired = 0                           # number of the latest deployment that was seen
        self.digest_mismatches = 0                 # builds refused for other bytes than were recorded, each attempt counted
        self.error = ""
        self._recent = Recent(tally, RECENT_S, time.monotonic())
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def serving(self) -> dict[str, EngineBuild]:
        """Workload tag -> build."""
        return dict(self._serving)

    @property
    def applied(self) -> int:
        """Number of the deployment record being served; 0 before the first."""
        return self._applied

    def poll(self) -> bool:
        """Compare the record with what is served and swap if they differ; True when drafts were swapped. Never raises."""
        try:
            desired = self._record.latest()
        except Exception as error:                 # shared storage away, or a record that can't be read
            self._note(f"the deployment record can't be read ({type(error).__name__}: {error})")
            return False
        self.desired = desired.n if desired is not None else 0
        if desired is None or desired.n == self._applied:
            self.error = ""
            return False
        if desired.n == self._failed and time.monotonic() < self._retry_at:
            return False
        try:
            swapped = self._apply(desired)
        except RestartNeeded as error:             # not an error: a new server takes over (serve/supervisor.py)
            self._failed, self._retry_at = desired.n, time.monotonic() + RETRY_S
            if self._needs_restart != desired.n:
                log.info("deployment %d: %s", desired.n, error)
            self._needs_restart, self.error = desired.n, ""
            return False
        except Exception as error:                 # whatever a build brings, serving goes on with what it has
            self._failed, self._retry_at = desired.n, time.monotonic() + RETRY_S
            self.digest_mismatches += isinstance(error, DigestMismatch)
            self._note(f"deployment {desired.n} is not served ({type(error).__name__}: {error})")
            return False
        self._applied, self._needs_restart, self.error = desired.n, 0, ""
        with contextlib.suppress(OSError, ValueError, TypeError):      # a figure for people: an old record that is gone stops nothing
            self.since = served_since(self._record, desired, self.replica)
        return swapped

    def report(self) -> ObservedState:
        """What this replica serves, with acceptance and throughput of the last seconds."""
        recent, seconds = self._recent.take(time.monotonic())
        versions = {build.draft_version for build in self._serving.values()}
        drafted = sum((counts for version, counts in recent.items() if version in versions), Counts())
        now = time.time()
        self._serving_since = self._serving_since or now
        return ObservedState(
            self.replica, self._config.target, self._applied, {tag: b.build_id for tag, b in self._serving.items()},
            {tag: b.draft_digest for tag, b in self._serving.items()}, drafted.acceptance_length,
            sum(counts.emitted for counts in recent.values()) / seconds, self.error, now, os.getpid(),
            self._needs_restart, self._serving_since)

    def publish(self) -> None:
        """Write the report beside the record, unless a successor has begun to. Never raises: a full disk must not stop serving."""
        try:
            if self._is_succeeded():
                return
            write_observed(self._config.state.observed, self.report())
        except OSError as error:
            self._note(f"observed state can't be written: {error}")

    def _is_succeeded(self) -> bool:
        """Whether another process of this name serves what this one could not."""
        seen = read_replica(self._config.state.observed, self._config.target, self.replica) if self._needs_restart else None
        return seen is not None and seen.pid != os.getpid() and seen.deployment >= self._needs_restart

    def start(self) -> None:
        self._thread = threading.Thread(target=self._loop, name="tide-draft-agent", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _apply(self, desired: Deployment) -> bool:
        wanted = desired.drafts_for(self.replica)
        builds = {tag: load_build(self._config.state.builds, self._config.target, build_id) for tag, build_id in wanted.items()}
        if {tag: b.build_id for tag, b in builds.items()} == {tag: b.build_id for tag, b in self._serving.items()}:
            return False
        self._engine.set_drafts(builds)
        self._serving, self._serving_since = builds, 0.0
        self._recorder.on_drafts_changed()
        log.info("deployment %d: now serving %s", desired.n, {tag: b.draft_version for tag, b in builds.items()})
        return True

    def _loop(self) -> None:
        torch.set_num_threads(self._config.serve.threads)
        settings, due = self._config.serve, 0.0
        while not self._stop.is_set():
            swapped = self.poll()
            if swapped or time.monotonic() >= due:
                self.publish()
                due = time.monotonic() + settings.report_s
            self._stop.wait(settings.agent_poll_s)

    def _note(self, error: str) -> None:
        if error != self.error:                    # a log is not filled by what a retry repeats
            log.warning("%s", error)
        self.error = error
