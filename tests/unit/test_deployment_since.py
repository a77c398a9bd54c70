"""Since when a draft is served by a replica, through the records of its rollout, and what the gate promised of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tide_pipeline.contracts import Deployment
from tide_pipeline.deployment import since as module
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.deployment.since import Since, served_since
from tide_pipeline.rollout.history import opened, restored, settled, widened


@pytest.fixture
def record(tmp_path: Path) -> DeploymentRecord:
    return DeploymentRecord(tmp_path, "tiny")


def write(record: DeploymentRecord, deployment: Deployment) -> Deployment:
    """At 100 seconds a number."""
    return record.append(replace(deployment, created_at=100.0 * deployment.n))


def rolled_out(record: DeploymentRecord, build: str, first_position: float) -> Deployment:
    canary = write(record, opened(record.latest(), "tiny", "*", build, ["a"], "me", "", first_position))
    return write(record, settled(write(record, widened(canary, ["a", "b"], "me", "")), "me", ""))


def test_from_the_record_that_named_it_first(record: DeploymentRecord) -> None:
    write(record, restored(None, "tiny", {"*": "old"}, "me", ""))
    done = rolled_out(record, "new", 0.7)
    assert done.n == 4
    assert served_since(record, done, "a") == {"*": Since(200.0, 0.7)}, "the canary"
    assert served_since(record, done, "b") == {"*": Since(300.0, 0.7)}, "a step later"
    assert served_since(record, done, "c") == {"*": Since(400.0, 0.7)}
    assert served_since(record, record.read(2), "b") == {"*": Since(100.0, 0.0)}, "the shipped draft came before no gate"


def test_other_workloads_and_the_way_back(record: DeploymentRecord) -> None:
    write(record, restored(None, "tiny", {"*": "old"}, "me", ""))
    rolled_out(record, "new", 0.7)
    both = write(record, restored(record.latest(), "tiny", {"*": "new", "de": "german"}, "me", ""))
    assert served_since(record, both, "c") == {"*": Since(400.0, 0.7), "de": Since(500.0)}
    back = write(record, restored(both, "tiny", {"*": "old"}, "me", ""))
    assert served_since(record, back, "c") == {"*": Since(600.0)}, "served anew"


def test_it_does_not_look_back_for_ever(record: DeploymentRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_BACK", 3)
    for _ in range(6):
        latest = write(record, restored(record.latest(), "tiny", {"*": "old"}, "me", ""))
    assert served_since(record, latest, "a") == {"*": Since(400.0)}
