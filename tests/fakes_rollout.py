"""An engines folder around the tiny target, and stand-ins for the replicas that a rollout is watched on.

A `FakeReplica` does what serve.agent does, without an engine: it polls the deployment record, verifies the build, reports observed
state, and writes acceptance rows of the draft it serves through capture's own writer. `judged` writes the report of a gate that was open.
"""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.helpers import tiny_spec, write_engine_toml
from tide_pipeline.capture.writer import LakeWriter
from tide_pipeline.config import CaptureSettings, TideConfig, override
from tide_pipeline.contracts import AcceptanceRow, BenchmarkReport, EngineBuild, GateVerdict, ObservedState, PairedAcceptance
from tide_pipeline.deployment.builds import load_build, read_build
from tide_pipeline.deployment.record import DeploymentRecord, write_observed
from tide_pipeline.errors import BuildError
from tide_pipeline.gate.judge import DOORS
from tide_pipeline.gate.run import GateReport, report_file
from tide_pipeline.provenance import write_json
from tide_pipeline.rollout import live
from tide_pipeline.rollout.live import ByBatch, Stretches
from tide_pipeline.rollout.rows import LiveRow
from tide_pipeline.rollout.sequential import Gap


def write_engine(root: Path, tiny_dir: Path, champion: Path | None = None) -> TideConfig:
    """Settings whose engine is `tiny` (with a champion, if one is given); `bare` beside it has none."""
    for name, shipped in (("tiny", champion), ("bare", None)):
        engine = root / "engines" / name
        shutil.copytree(tiny_dir, engine / "target")
        if shipped is not None:
            shutil.copytree(shipped, engine / "champion")
        write_engine_toml(engine, tiny_spec(champion="champion" if shipped else ""))
    return override(TideConfig(), {"engine": "tiny", "engines_dir": str(root / "engines"), "state_dir": str(root / "state"),
                                   "rollout": {"mode": "auto", "bake_s": 0.3, "min_bake_steps": 30, "max_bake_s": 6.0, "heartbeat_s": 6.0,
                                               "step_s": 0.2}})


def judged(config: TideConfig, build: EngineBuild, workload: str = "de", at: float | None = None, **over: Any) -> GateVerdict:
    """A verdict whose doors are all open, against what serves the workload now, with its report on disk, written `at`."""
    doors: dict[str, dict[str, Any]] = {name: {"passed": True, "reason": "good"} for name in DOORS}
    doors["offline"] |= {"champion_first_position": 0.3, "challenger_first_position": 0.8}
    latest = DeploymentRecord(config.state.deployments, config.target).latest()
    rest = latest.groups["rest"] if latest is not None else {}
    served = rest.get(workload) or rest.get("*")
    champion = read_build(config.state.builds, config.target, served).draft_version if served else ""
    verdict = dataclasses.replace(GateVerdict(True, doors, champion, build.draft_version, build.draft_digest), **over)
    bench = BenchmarkReport(build.build_id, build.draft_version, 2.7, 400.0, 250.0, 1.6, 1.5, 1.7, 9.0, 8, 768, 2, 0)
    file = report_file(config, build.build_id)
    write_json(file, dataclasses.asdict(GateReport(verdict, PairedAcceptance(1.6, 2.7, 1.1, 1.0, 1.2, 31, 6200), None, bench, workload,
                                                   build.build_id)))
    if at is not None:
        os.utime(file, (at, at))
    return verdict


class FakeReplica:
    """One replica's agent and traffic. `rates` maps draft digests to first-position acceptance; others get 0.5.

    `slow` is the digest of a draft whose steps take twice the time; `start_s` is how long a change of draft takes.
    """

    def __init__(self, config: TideConfig, name: str, *, rates: dict[str, float] | None = None, traffic: bool = True,
                 breaks_on: str = "", dies_on: str = "", workload: str = "de", slow: str = "", start_s: float = 0.0) -> None:
        self.config, self.name, self.rates, self.traffic, self.workload = config, name, rates or {}, traffic, workload
        self.breaks_on, self.dies_on = breaks_on, dies_on              # digest whose build it can't load, or that kills it
        self.record = DeploymentRecord(config.state.deployments, config.target)
        self.slow, self.start_s, self._ready_at = slow, start_s, 0.0
        self.applied, self.error, self.serving_since = 0, "", 0.0
        self.served: dict[str, EngineBuild] = {}
        self.digests_seen: list[dict[str, str]] = []
        self._rng = random.Random(name)
        self._writer = LakeWriter(CaptureSettings(flush_s=0.05), config.target, config.state.lake, name)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> FakeReplica:
        self._poll()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._writer.close()

    def serve(self, requests: int) -> None:
        """Requests of 16 steps each, answered with the draft being served."""
        for _ in range(requests):
            self._answer()
        self._writer.flush()

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            if not self._poll():
                return
            if self.traffic:
                self._answer()

    def _poll(self) -> bool:
        desired = self.record.latest()
        if desired is not None and desired.n > self.applied and self._is_started(desired.drafts_for(self.name)):
            try:
                drafts = {tag: self._load(build_id) for tag, build_id in desired.drafts_for(self.name).items()}
            except BuildError as error:
                self.error = str(error)
            else:
                if self.dies_on and any(b.draft_digest == self.dies_on for b in drafts.values()):
                    return False
                self.serving_since = self.serving_since if drafts == self.served else time.time()
                self.served, self.applied, self.error = drafts, desired.n, ""
                self.digests_seen.append({tag: b.draft_digest for tag, b in drafts.items()})
        write_observed(self.config.state.observed, ObservedState(
            self.name, self.config.target, self.applied, {t: b.build_id for t, b in self.served.items()},
            {t: b.draft_digest for t, b in self.served.items()}, 2.0, 100.0 if self.traffic else 0.0, self.error, time.time(), 0,
            0, self.serving_since))
        return True

    def _is_started(self, drafts: dict[str, str]) -> bool:
        """Whether the server that can serve these is up; meanwhile the old one goes on."""
        if not self.start_s or not self.served or drafts == {tag: b.build_id for tag, b in self.served.items()}:
            return True
        self._ready_at = self._ready_at or time.monotonic() + self.start_s
        if time.monotonic() < self._ready_at:
            return False
        self._ready_at = 0.0
        return True

    def _load(self, build_id: str) -> EngineBuild:
        build = load_build(self.config.state.builds, self.config.target, build_id)
        if build.draft_digest == self.breaks_on:
            raise BuildError(f"build {build_id} can't be loaded here")
        return build

    def _answer(self) -> None:
        build = self.served.get(self.workload) or self.served.get("*")
        rate = self.rates.get(build.draft_digest, 0.5) if build else 0.0
        accepted = sum(self._rng.random() < rate for _ in range(16))
        version, length = (build.draft_version, 3) if build else ("", 0)
        took_ms = 60.0 if build and build.draft_digest == self.slow else 30.0
        kept = (accepted, accepted // 2, accepted // 4)[:length]
        self._writer.offer_row(AcceptanceRow(
            time.time(), f"{self.name}-{time.time_ns()}", self.workload, "acme", self.name, "engine", version, "auto", 0.0, length, False,
            16, (16,) * length, kept, 16 + sum(kept), 1.0, took_ms, 8, "length", 5.0))


# --- figures of rows that are all there -------------------------------------------------------------------------

def slowdown(new: Iterable[LiveRow], old: Iterable[LiveRow]) -> Gap | None:
    """Of rows side by side, as the log brings them."""
    both = Stretches(sides=2)
    for row, side in sorted([*((row, 0) for row in new), *((row, 1) for row in old)], key=lambda pair: pair[0].at):
        both.add(row, side)
    return live.slowdown(both)


def slowdown_since(new: Iterable[LiveRow], old: Iterable[LiveRow]) -> Gap | None:
    """Of rows one behind the other."""
    sides = ByBatch(), ByBatch()
    for found, rows in zip(sides, (new, old), strict=True):
        for row in rows:
            found.add(row)
    return live.slowdown_since(*sides)
