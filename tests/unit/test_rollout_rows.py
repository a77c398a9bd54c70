"""The acceptance log as a rollout reads it: each row once, whatever compaction does, and nothing passed over."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fakes_drift import acceptance_row, config_in, deploy, write_build, write_log
from tide_pipeline.capture.compact import compact
from tide_pipeline.capture.layout import live_shards
from tide_pipeline.capture.store import Stored
from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import ObservedState
from tide_pipeline.deployment.record import DeploymentRecord, write_observed
from tide_pipeline.errors import LakeError
from tide_pipeline.rollout.drive import Driver
from tide_pipeline.rollout.history import opened, withdrawn
from tide_pipeline.rollout.plan import Kind
from tide_pipeline.rollout.rows import LiveLog, LiveRow

NOW = time.time()


class Names:
    """Request ids in the order in which they were added."""

    def __init__(self) -> None:
        self.all: list[str] = []

    def add(self, row: LiveRow, /) -> None:
        self.all.append(row.request_id)


@pytest.fixture
def config(tmp_path: Path) -> TideConfig:
    return config_in(tmp_path)


@pytest.fixture
def log(config: TideConfig) -> LiveLog[Names]:
    return LiveLog(config, NOW - 60, Names)


def shard(config: TideConfig, *names: str, **changes: Any) -> None:
    write_log(config, [acceptance_row(NOW, request_id=name, **changes) for name in names])


def test_rows_are_added_as_capture_writes_them_and_once(config: TideConfig, log: LiveLog[Names]) -> None:
    assert log.sums().all == []
    shard(config, "a", "b")
    write_log(config, [acceptance_row(NOW - 61, request_id="too early")])
    assert log.sums().all == ["a", "b"]
    shard(config, "c")
    assert log.sums().all == log.sums().all == ["a", "b", "c"]
    found: list[LiveRow] = []
    LiveLog(config, NOW - 60, lambda: type("Rows", (), {"add": lambda self, row: found.append(row)})()).sums()
    assert found[0] == LiveRow(pytest.approx(NOW), "a", "en", "replica-0", "v1", 30, 24, 84, 600.0, "length", 4.0)  # type: ignore[arg-type]


def test_compaction_adds_nothing(config: TideConfig, log: LiveLog[Names]) -> None:
    for i in range(8):
        shard(config, f"{i}")
    assert len(log.sums().all) == 8
    assert compact(config.state.lake, settle_s=0.0).new_shards == 1
    shard(config, "late")
    assert log.sums().all == [*(f"{i}" for i in range(8)), "late"], "the same rows in another shard"
    for i in range(8):
        shard(config, f"more {i}")
    assert compact(config.state.lake, settle_s=0.0).new_shards == 1, "of read and unread shards"
    assert sorted(log.sums().all) == sorted([*(f"{i}" for i in range(8)), "late", *(f"more {i}" for i in range(8))])
    assert len(log.sums().all) == 17 and len(LiveLog(config, NOW - 60, Names).sums().all) == 17


def test_a_read_that_fails_is_told_and_tried_again(config: TideConfig, log: LiveLog[Names], monkeypatch: pytest.MonkeyPatch) -> None:
    shard(config, "a")
    live_shards(config.state.acceptance, config.target)                # the listing remembers that it is complete
    with monkeypatch.context() as away:
        away.setattr(Stored, "open", lambda self: (_ for _ in ()).throw(OSError("the bucket timed out")))
        with pytest.raises(LakeError, match=r"the bucket timed out.*tried again"):
            log.sums()
        shard(config, "b")                                             # here the listing itself reads
        with pytest.raises(LakeError, match="the bucket timed out"):
            log.sums()
    assert sorted(log.sums().all) == ["a", "b"], "no row is lost to it"


def test_a_damaged_shard_is_named(config: TideConfig, log: LiveLog[Names]) -> None:
    shard(config, "a")
    file = next(config.state.acceptance.rglob("*.parquet"))
    whole = file.read_bytes()
    for damaged in (whole[:-200] + b"x" * 196 + b"PAR1", whole[:-200]):
        file.write_bytes(damaged)
        with pytest.raises(LakeError, match="`tide signals verify`"):
            log.sums()
    file.unlink()
    shard(config, "b")
    assert log.sums().all == ["b"]


def test_a_shard_that_went_after_the_listing_is_passed_over(config: TideConfig, log: LiveLog[Names],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    shard(config, "a")
    live_shards(config.state.acceptance, config.target)
    with monkeypatch.context() as gone:
        gone.setattr(Stored, "open", lambda self: (_ for _ in ()).throw(FileNotFoundError(self.key)))
        assert log.sums().all == []
    assert log.sums().all == ["a"]


def test_a_rollout_waits_while_the_log_can_not_be_read_and_keeps_no_row(config: TideConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    record, driver = DeploymentRecord(config.state.deployments, config.target), Driver(config, "test")
    write_build(config, "aa", "v1")
    write_build(config, "bb", "v2")
    deploy(config, {"*": "aa"}, NOW)
    latest = record.append(opened(record.latest(), config.target, "*", "bb", ["replica-0"], "test", "drift"))
    write_observed(config.state.observed, ObservedState("replica-0", config.target, latest.n, {"*": "bb"}, {"*": "digest"}, 2.0, 9.0, "",
                                                        time.time(), 1))
    write_log(config, [acceptance_row(time.time() + 1, request_id=f"r{i}", draft_version="v2") for i in range(100)])
    with monkeypatch.context() as away:
        away.setattr(Stored, "open", lambda self: (_ for _ in ()).throw(OSError("the bucket timed out")))
        waits = driver.look(latest)
    assert waits.kind is Kind.WAIT and "live traffic can't be seen: a shard of the acceptance log" in waits.reason
    assert "100 requests" in driver.look(latest).reason
    kept = LiveRow(NOW, "r0", "en", "replica-0", "v2", 1, 1)
    of_this = [row for row in gc.get_objects() if type(row) is LiveRow and (row.request_id, row.draft_version) == ("r0", "v2")]
    assert of_this == [kept]
    assert driver._watcher._log is not None
    driver.look(withdrawn(latest, "test", "enough"))
    assert driver._watcher._log is None
