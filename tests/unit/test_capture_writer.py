"""Shards: complete or absent, private, retried, bounded. Real Parquet on a real disk."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.fakes_capture import HIDDEN, TARGET, FakeEngine, make_recorder, make_ring
from tide_pipeline.capture import lane as lane_module
from tide_pipeline.capture import store as store_module
from tide_pipeline.capture.lane import Lane, LaneLimits
from tide_pipeline.capture.reader import count_rows, list_windows, live_shards, read_states
from tide_pipeline.capture.recorder import Recorder
from tide_pipeline.capture.windows import RowShape
from tide_pipeline.config import CaptureSettings


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    made = make_recorder(tmp_path)
    yield made
    made.close()


def wait_until(condition, seconds: float = 10.0) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_where_shards_lie_and_who_may_read_them(recorder: Recorder, tmp_path: Path) -> None:
    FakeEngine(recorder).run("r")
    assert recorder.flush()
    for dataset in ("signals", "acceptance"):
        shard = Path(*live_shards(tmp_path / dataset, TARGET))
        target, date, hour = shard.relative_to(tmp_path / dataset).parts[:3]
        assert (target, date, hour) == (f"target={TARGET}", time.strftime("date=%Y-%m-%d", time.gmtime()),
                                        time.strftime("hour=%H", time.gmtime()))
        assert shard.name.startswith("replica-0-")
        assert stat.S_IMODE(shard.stat().st_mode) == 0o600
        assert [p for p in shard.parent.iterdir() if p != shard] == []
    assert recorder.stats()["written_shards"] == 2
    assert recorder.stats()["written_bytes"] == sum(p.stat().st_size for p in tmp_path.rglob("*.parquet"))


def test_a_shard_is_written_at_its_age_and_at_its_size(tmp_path: Path) -> None:
    aged = make_recorder(tmp_path / "age", CaptureSettings(mode="on", flush_s=0.05))
    FakeEngine(aged).run("r")
    wait_until(lambda: aged.stats()["written_shards"] == 2)
    full = make_recorder(tmp_path / "size", CaptureSettings(mode="on", flush_s=3600.0, shard_rows=30))
    engine = FakeEngine(full)
    for i in range(4):
        engine.run(f"r{i}")                              # 13 rows each
    wait_until(lambda: len(live_shards(tmp_path / "size" / "signals", TARGET)) == 1)
    assert count_rows(tmp_path / "size" / "signals", TARGET) == 39
    aged.close()
    full.close()
    assert count_rows(tmp_path / "size" / "signals", TARGET) == 52


def test_close_writes_what_waits_and_later_offers_are_counted(tmp_path: Path) -> None:
    recorder = make_recorder(tmp_path)
    engine = FakeEngine(recorder)
    engine.open("r", 3)
    engine.prefill("r", 3)
    recorder.close()                                     # in flight: closed as cancelled
    assert count_rows(tmp_path / "signals", TARGET) == 3
    engine.run("late")
    assert recorder.stats()["dropped_windows"] == 1 and recorder.stats()["dropped_tokens"] == 13
    recorder.close()


def test_a_full_queue_drops_and_counts(tmp_path: Path) -> None:
    recorder = make_recorder(tmp_path, CaptureSettings(mode="on", flush_s=3600.0, queue_windows=2))
    engine = FakeEngine(recorder)
    for i in range(5):
        engine.run(f"r{i}")
    stats = recorder.stats()
    assert (stats["dropped_windows"], stats["dropped_tokens"], stats["captured_tokens"]) == (3, 39, 26)
    recorder.close()
    assert count_rows(tmp_path / "signals", TARGET) == 26


def test_a_disk_that_refuses_costs_nothing_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_module, "FIRST_PAUSE_S", 0.02)
    recorder = make_recorder(tmp_path, CaptureSettings(mode="on", flush_s=0.01))
    replace = os.replace

    def no_space(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module.os, "replace", no_space)
    engine = FakeEngine(recorder)
    engine.run("a")
    wait_until(lambda: int(recorder.stats()["write_errors"]) >= 3)
    assert not recorder.flush()
    assert "No space left" in str(recorder.stats()["writer_error"]) and str(tmp_path) in str(recorder.stats()["writer_error"])
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []         # not even half a file
    engine.run("b")
    monkeypatch.setattr(store_module.os, "replace", replace)
    wait_until(lambda: recorder.stats()["queued_windows"] == 0 and recorder.stats()["queued_acceptance_rows"] == 0)
    assert recorder.stats()["writer_error"] == ""
    recorder.close()
    assert count_rows(tmp_path / "signals", TARGET) == 26
    assert len({w.request_id for w in list_windows(tmp_path / "signals", TARGET).windows}) == 2


def test_an_unusable_signals_folder_leaves_acceptance_alone(tmp_path: Path) -> None:
    (tmp_path / "signals").write_text("in the way")
    recorder = make_recorder(tmp_path)
    FakeEngine(recorder).run("r")
    assert not recorder.flush()
    assert str(recorder.stats()["writer_error"]).startswith("signals: ")
    assert len(live_shards(tmp_path / "acceptance", TARGET)) == 1
    recorder.close()
    assert recorder.stats()["dropped_windows"] == 1


def test_what_can_not_be_encoded_is_dropped_and_the_rest_goes_on(tmp_path: Path) -> None:
    recorder = make_recorder(tmp_path)
    engine = FakeEngine(recorder)
    engine.open("r", 3)
    engine.close("r", ttft_ms="soon")  # type: ignore[arg-type]
    assert recorder.flush()
    assert recorder.stats()["dropped_acceptance_rows"] == 1
    engine.run("fine")
    assert recorder.flush()
    assert len(live_shards(tmp_path / "acceptance", TARGET)) == 1
    recorder.close()


def test_states_are_stored_plain_and_without_statistics(recorder: Recorder, tmp_path: Path) -> None:
    FakeEngine(recorder).run("r")
    recorder.flush()
    (shard,) = live_shards(tmp_path / "signals", TARGET)
    group = pq.read_metadata(shard).row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    for name, column in columns.items():
        is_state = name in ("taps", "final")
        assert column.compression == ("UNCOMPRESSED" if is_state else "LZ4"), name
        if is_state or name == "prompt_digest" or "token" in name.split(".")[0]:
            assert column.statistics is None, name
    assert columns["workload"].statistics is not None


def test_big_windows_make_several_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tide_pipeline.capture.encode.GROUP_BYTES", 13 * HIDDEN * 4 * 2)
    recorder = make_recorder(tmp_path)
    engine = FakeEngine(recorder, make_ring())
    for i in range(3):
        engine.run(f"r{i}")
    recorder.close()
    (shard,) = live_shards(tmp_path / "signals", TARGET)
    assert pq.read_metadata(shard).num_row_groups == 3
    windows = list_windows(tmp_path / "signals", TARGET).windows
    assert [s.window.request_id for s in read_states(windows[::-1][1:], strict=True)] == ["r1", "r2"]


def test_a_shard_holds_what_fits_an_object() -> None:
    lane: Lane[str] = Lane(LaneLimits(items=9, bytes=1000, shard_rows=100, age_s=2.0, shard_bytes=100))
    for name, size in (("a", 60), ("b", 30), ("c", 30), ("d", 150)):
        assert lane.offer(name, 1, size, now=0.0)
    assert lane.due_at() == 0.0
    batches = []
    while len(lane):
        batches.append(lane.batch())
        lane.done(len(batches[-1]))
    assert batches == [["a", "b"], ["c"], ["d"]]
    assert RowShape(256, 3, True, "").max_rows == 1024
    wide = RowShape(16_384, 3, True, "")
    assert 2 * wide.width * wide.max_rows <= 32 * 2**20 < 2 * wide.width * (wide.max_rows + 1)


def test_a_key_that_can_not_be_read_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDE_LAKE_KEY_FILE", str(tmp_path / "key"))
    recorder = make_recorder(tmp_path / "lake")
    FakeEngine(recorder).run("r")
    assert not recorder.flush() and "openssl rand -hex 32" in str(recorder.stats()["writer_error"])
    (tmp_path / "key").touch(0o600)
    (tmp_path / "key").write_text("5a" * 32)
    assert recorder.flush() and count_rows(tmp_path / "lake" / "signals", TARGET) == 13
    recorder.close()


def test_lane_backs_off_and_returns() -> None:
    lane: Lane[str] = Lane(LaneLimits(items=3, bytes=100, shard_rows=10, age_s=2.0))
    assert lane.due_at() == float("inf")
    assert lane.offer("a", 4, 60, now=0.0) and lane.due_at() == 2.0
    assert not lane.offer("too many bytes", 1, 50, now=0.0)
    assert lane.offer("b", 6, 10, now=0.0) and lane.due_at() == 0.0
    assert lane.offer("c", 1, 1, now=0.0) and not lane.offer("too many", 1, 1, now=0.0)
    assert lane.batch() == ["a", "b"]
    pauses = []
    for _ in range(9):
        lane.failed("no", now=100.0)
        pauses.append(lane.due_at() - 100.0)
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    lane.done(2)
    assert (len(lane), lane.error, lane.due_at(), lane.dropped_items, lane.dropped_rows) == (1, "", 2.0, 2, 2)
