"""Which builds are kept: what `tide rollback` may ask for, however many canaries went back since, and nothing for replicas long gone."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.fakes_drift import config_in, deploy, write_build
from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import Deployment, ObservedState
from tide_pipeline.deployment.builds import list_builds
from tide_pipeline.deployment.record import DeploymentRecord, write_observed
from tide_pipeline.rollout import rollback
from tide_pipeline.rollout.history import opened, withdrawn
from tide_pipeline.rollout.tidy import KEPT_DEPLOYMENTS, KEPT_STATES, SILENT_S, tidy_builds

NOW = time.time()


@pytest.fixture
def config(tmp_path: Path) -> TideConfig:
    return config_in(tmp_path)


def goes_back(record: DeploymentRecord, build_id: str) -> Deployment:
    latest = record.append(opened(record.latest(), record.target, "*", build_id, ["replica-0"], "run", "drift"))
    return record.append(withdrawn(latest, "run", "worse"))


def kept(config: TideConfig) -> set[str]:
    tidy_builds(config, NOW)
    return {build.build_id for build in list_builds(config.state.builds, config.target)}


def test_a_rollback_finds_its_builds_after_any_number_of_canaries(config: TideConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    record, states = DeploymentRecord(config.state.deployments, config.target), [f"a{i}" for i in range(KEPT_STATES + 2)]
    for build_id in states:
        write_build(config, build_id, build_id)
        deploy(config, {"*": build_id}, NOW)
    for i in range(KEPT_DEPLOYMENTS):
        write_build(config, f"b{i}", f"b{i}")
        goes_back(record, f"b{i}")
    found = kept(config)
    assert found >= {states[0], *states[-KEPT_STATES:]} and states[1] not in found and "b0" not in found
    monkeypatch.setattr("tide_pipeline.rollout.undo.load_build", lambda builds, target, build_id: None)
    for before in reversed(states[-KEPT_STATES:-1]):
        assert rollback(config, who="me", reason="further").groups["rest"]["*"] == before
        assert before in kept(config)


def test_a_replica_that_is_long_gone_keeps_nothing(config: TideConfig) -> None:
    for build_id, at in (("aa", NOW - SILENT_S - 1), ("bb", NOW - SILENT_S + 60)):
        write_build(config, build_id, build_id)
        write_observed(config.state.observed, ObservedState(f"replica-{build_id}", config.target, 1, {"*": build_id}, {}, 2.0, 9.0, "",
                                                            at, 1))
    assert kept(config) == {"bb"}
