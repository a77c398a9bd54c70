"""Rollouts of drafts whose benchmark the gate left to the canary: it is timed there, beside control replicas or against its own past.

Replicas are tests/fakes_rollout.py's, the log, the record and the driver are real. A stretch of time is shorter than in production.
"""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from tests.fakes_rollout import FakeReplica, judged
from tests.integration.test_rollout import challenger, champion, config, quick, stages  # noqa: F401 fixtures
from tide_pipeline.config import TideConfig, override
from tide_pipeline.contracts import Deployment, EngineBuild, GateVerdict
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.errors import GateNotPassed, RolloutRefused
from tide_pipeline.gate.judge import ON_CANARY
from tide_pipeline.rollout import live
from tide_pipeline.rollout.promote import promote, propose


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "BLOCK_S", 0.1)


@pytest.fixture
def build(challenger: EngineBuild) -> EngineBuild:  # noqa: F811
    """As if it were for TensorRT-LLM."""
    return replace(challenger, backend="trtllm")


def left_to_the_canary(config: TideConfig, build: EngineBuild) -> GateVerdict:  # noqa: F811
    verdict = judged(config, build)
    return replace(verdict, doors=verdict.doors | {name: dict(door) for name, door in ON_CANARY.items()})


def go(config: TideConfig, build: EngineBuild, **rollout: float) -> Deployment:  # noqa: F811
    return promote(override(config, {"rollout": rollout}), build, left_to_the_canary(config, build), who="test", reason="drift on de")


def test_beside_a_control_replica_it_is_timed_and_then_goes_on(config: TideConfig, champion: Deployment,  # noqa: F811
                                                             build: EngineBuild) -> None:
    with FakeReplica(config, "replica-0"), FakeReplica(config, "replica-1"):
        done = go(config, build, max_bake_s=30.0)
    assert stages(config) == ["stable", "canary", "rolling", "stable"]
    canary, rolling = DeploymentRecord(config.state.deployments, "tiny").history()[1:3]
    assert canary.deferred == rolling.deferred == ("benchmark",) and done.deferred == ()
    assert "time per token, log ratio" in rolling.reason and "beside it" in rolling.reason


def test_a_draft_that_accepts_as_much_and_is_slower_goes_back(config: TideConfig, champion: Deployment,  # noqa: F811
                                                            build: EngineBuild) -> None:
    with FakeReplica(config, "replica-0", slow=build.draft_digest), FakeReplica(config, "replica-1"):
        done = go(config, build, max_bake_s=30.0)
    assert stages(config) == ["stable", "canary", "rolled_back"] and "time per token, log ratio +0." in done.reason


@pytest.mark.parametrize("is_slow", [False, True])
def test_a_replica_alone_is_timed_against_its_own_past(config: TideConfig, champion: Deployment, build: EngineBuild,  # noqa: F811
                                                      is_slow: bool) -> None:
    with FakeReplica(config, "replica-0", slow=build.draft_digest if is_slow else ""):
        time.sleep(2.0)                                      # its past
        done = go(config, build, max_bake_s=30.0)
    assert done.stage == ("rolled_back" if is_slow else "stable") and "time per token, log ratio +0." in done.reason.replace("-0.", "+0.")
    assert is_slow or "against its own last" in done.reason


@pytest.mark.parametrize("traffic", [False, True])
def test_what_could_not_be_timed_goes_back_and_says_what_to_do(config: TideConfig, champion: Deployment, build: EngineBuild,  # noqa: F811
                                                             traffic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asks anything; or the canary answers, and nothing answers beside it."""
    monkeypatch.setattr("tide_pipeline.rollout.live.BLOCK_S", 30.0)
    with FakeReplica(config, "replica-0", traffic=traffic), FakeReplica(config, "replica-1", traffic=False):
        done = go(config, build, max_bake_s=1.5)
    assert stages(config) == ["stable", "canary", "rolled_back"] and done.groups == champion.groups
    assert "send canary and controls more traffic, or raise rollout.max_bake_s" in done.reason


def test_a_server_that_starts_for_longer_than_a_bake_is_baked_all_the_same(config: TideConfig, champion: Deployment,  # noqa: F811
                                                                         build: EngineBuild) -> None:
    with FakeReplica(config, "replica-0", start_s=5.5), FakeReplica(config, "replica-1"):
        done = go(config, build, max_bake_s=5.0)
        assert done.stage == "stable", done.reason
    canary, rolling = DeploymentRecord(config.state.deployments, "tiny").history()[1:3]
    assert rolling.created_at - canary.created_at > 5.8 and "time per token" in rolling.reason, "5.5 s to start, then at least 0.3 s"


def test_only_what_the_gate_could_not_time_is_left_to_a_canary(config: TideConfig, champion: Deployment, build: EngineBuild,  # noqa: F811
                                                             challenger: EngineBuild) -> None:  # noqa: F811
    for wrong, verdict in ((build, judged(config, build)), (challenger, left_to_the_canary(config, challenger))):
        with pytest.raises(GateNotPassed, match="run `tide gate` on this build"):
            promote(config, wrong, verdict, who="test", reason="")
    with pytest.raises(RolloutRefused, match="no replica of tiny has ever reported"):
        go(config, build)
    assert propose(config, build, left_to_the_canary(config, build), who="test", reason="").deferred == ("benchmark",)
    assert stages(config) == ["stable", "proposed"]
