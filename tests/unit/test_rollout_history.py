"""What was served before what, from the record alone; and undoing by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes_rollout import write_engine
from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import Deployment
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.errors import BuildError, DeploymentConflict, NothingToRollBack
from tide_pipeline.rollout import rollback
from tide_pipeline.rollout.history import decide_and_append, next_n, served_states


@pytest.fixture
def config(tmp_path: Path, tiny_dir: Path) -> TideConfig:
    return write_engine(tmp_path, tiny_dir)


@pytest.fixture
def record(config: TideConfig) -> DeploymentRecord:
    return DeploymentRecord(config.state.deployments, config.target)


def write(record: DeploymentRecord, stage: str, rest: str, canary: str = "") -> Deployment:
    groups = {"rest": {"*": rest} if rest else {}} | ({"canary": {"*": canary}} if canary else {})
    return record.append(Deployment(next_n(record.latest()), record.target, groups, ("a",) if canary else (), stage, "test", stage))


def states(record: DeploymentRecord) -> list[str]:
    return [drafts.get("*", "") for drafts in served_states(record.history())]


def test_what_was_rolled_back_from_is_no_earlier_state(record: DeploymentRecord) -> None:
    assert served_states([]) == []
    write(record, "stable", "a")
    write(record, "canary", "a", "b")
    write(record, "stable", "b")
    write(record, "canary", "b", "c")
    write(record, "rolled_back", "b")
    assert states(record) == ["a", "b"]
    write(record, "stable", "c")
    write(record, "rolled_back", "b")
    assert states(record) == ["a", "b"]
    write(record, "stable", "a")
    assert states(record) == ["a", "b", "a"]


def test_the_first_draft_of_all_has_no_speculation_before_it(record: DeploymentRecord) -> None:
    write(record, "canary", "", "a")
    write(record, "stable", "a")
    assert states(record) == ["", "a"]


def test_rolling_back_again_goes_further_back(config: TideConfig, record: DeploymentRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tide_pipeline.rollout.undo.load_build", lambda *_: None)
    with pytest.raises(NothingToRollBack, match="ever deployed"):
        rollback(config, who="me", reason="why not")
    for build in "abc":
        write(record, "stable", build)
    assert [rollback(config, who="me", reason="bad").groups["rest"]["*"] for _ in range(2)] == ["b", "a"]
    with pytest.raises(NothingToRollBack, match="first draft"):
        rollback(config, who="me", reason="bad")
    last = record.latest()
    assert last is not None and (last.stage, last.who, last.reason) == ("rolled_back", "me", "bad")


def test_rolling_back_a_canary_ends_it(config: TideConfig, record: DeploymentRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tide_pipeline.rollout.undo.load_build", lambda *_: None)
    write(record, "stable", "a")
    write(record, "canary", "a", "b")
    assert rollback(config, who="me", reason="enough").groups == {"rest": {"*": "a"}}


def test_nothing_is_restored_that_can_not_be_loaded(config: TideConfig, record: DeploymentRecord) -> None:
    write(record, "stable", "a")
    write(record, "stable", "b")
    with pytest.raises(BuildError, match="missing"):
        rollback(config, who="me", reason="bad")
    assert len(record.history()) == 2


def test_who_loses_the_race_decides_again(record: DeploymentRecord) -> None:
    seen: list[int] = []

    def slow(latest: Deployment | None) -> Deployment:
        seen.append(next_n(latest))
        if len(seen) < 3:
            write(record, "stable", f"other{len(seen)}")
        return Deployment(seen[-1], record.target, {"rest": {}}, (), "stable", "me", "")

    assert decide_and_append(record, slow).n == 3 and seen == [1, 2, 3]

    def hopeless(latest: Deployment | None) -> Deployment:
        write(record, "stable", "other")
        return Deployment(next_n(latest), record.target, {"rest": {}}, (), "stable", "me", "")

    with pytest.raises(DeploymentConflict):
        decide_and_append(record, hopeless)
