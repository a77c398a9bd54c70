"""Made-up acceptance logs for the drift and report tests, written by capture's own writer."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tide_pipeline.capture import names
from tide_pipeline.capture.writer import LakeWriter
from tide_pipeline.config import CaptureSettings, TideConfig, override
from tide_pipeline.contracts import AcceptanceRow, Deployment, EngineBuild
from tide_pipeline.deployment.builds import build_dir, save_build
from tide_pipeline.deployment.record import DeploymentRecord

TARGET = "pocket"
_order = itertools.count(1)


def config_in(folder: Path, **drift: object) -> TideConfig:
    """Settings with their state under `folder`: 20 s windows, 100 steps, unless `drift` says otherwise."""
    values = {"recent_s": 20.0, "min_steps": 100, **drift}
    return override(TideConfig(), {"engine": TARGET, "state_dir": str(folder / "state"), "drift": values})


def acceptance_row(time: float, **changes: Any) -> AcceptanceRow:
    """A finished request of one block: 30 steps of draft length 3, 24 first tokens accepted."""
    values: dict[str, Any] = {
        "time": time, "request_id": f"r{time:.6f}", "workload": "en", "tenant": "acme", "replica": "replica-0", "engine_digest": "engine",
        "draft_version": "v1", "speculation": "auto", "temperature": 0.0, "draft_length": 3, "is_probe": False, "num_steps": 30,
        "drafted": (30, 30, 30), "accepted": (24, 18, 12), "emitted_tokens": 84, "mean_batch_size": 4.0, "duration_ms": 600.0,
        "num_prompt_tokens": 50, "finish_reason": "length", "ttft_ms": 15.0}
    return AcceptanceRow(**{**values, **changes})


def traffic(rng: random.Random, begin: float, end: float, rate: float, *, requests_per_s: float = 4.0, steps: int = 30,
            spread: float = 0.08, drafted_share: float = 1.0, **changes: Any) -> Iterator[AcceptanceRow]:
    """Requests that end between two times, each with its own rate around `rate`; `drafted_share` of their steps drafted a token."""
    count = round((end - begin) * requests_per_s)
    for i in range(count):
        own = min(1.0, max(0.0, rng.gauss(rate, spread)))
        drafted = sum(rng.random() < drafted_share for _ in range(steps))
        accepted = sum(rng.random() < own for _ in range(drafted))
        at = begin + (i + 1) / count * (end - begin)
        name = f"{changes.get('workload', 'en')}-{at:.4f}"
        probing = drafted_share < 1.0
        rows = [acceptance_row(at, request_id=name, num_steps=drafted, drafted=(drafted,), accepted=(accepted,), draft_length=1,
                               emitted_tokens=drafted + accepted, is_probe=probing, **changes)] if drafted else []
        if drafted < steps:
            rows.append(acceptance_row(at, request_id=name, num_steps=steps - drafted, drafted=(), accepted=(), draft_length=0,
                                       emitted_tokens=steps - drafted, **changes))
        yield from rows


def write_log(config: TideConfig, rows: Iterable[AcceptanceRow], *, target: str = TARGET) -> None:
    """One shard, or as many as the writer makes; named as if written when its last row was closed.

    Not now: `NOW` of a test's module may be a quarter of an hour ago when the test comes, and the log is read for rows no later than that.
    """
    rows = list(rows)
    last = max((row.time for row in rows), default=0.0)
    with pytest.MonkeyPatch.context() as then:
        if vars(names)["time"] is time and time.time() - 3600 < last < time.time():
            then.setattr(names, "time", SimpleNamespace(time_ns=lambda: int(last * 1e9) + next(_order), time=time.time))
        writer = LakeWriter(CaptureSettings(flush_s=3600.0), target, config.state.lake, "replica-0")
        for row in rows:
            assert writer.offer_row(row)
        writer.close()


def write_build(config: TideConfig, build_id: str, version: str, **warmup: float) -> EngineBuild:
    """A build's record; no draft beside it."""
    folder = build_dir(config.state.builds, config.target, build_id)
    folder.mkdir(parents=True)
    build = EngineBuild(build_id, config.target, "embedded", str(folder), version, "digest", "engine", 0.0, warmup)
    save_build(build)
    return build


def deploy(config: TideConfig, drafts: dict[str, str], at: float, *, stage: str = "stable", reason: str = "test") -> Deployment:
    """The next record: workload tag -> build id."""
    record = DeploymentRecord(config.state.deployments, config.target)
    latest = record.latest()
    return record.append(Deployment((latest.n if latest else 0) + 1, config.target, {"rest": drafts}, (), stage, "tests", reason, at))
