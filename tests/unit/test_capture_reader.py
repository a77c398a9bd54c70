"""Finding windows and reading states: filters, pruning, and everything that can be wrong with a file."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch

from tests.fakes_capture import ENGINE, HIDDEN, SLOW, TAPS, TARGET, FakeEngine, states_of
from tide_pipeline.capture.names import SUPERSEDES_KEY, sealed, successor, written_at
from tide_pipeline.capture.reader import count_rows, list_windows, live_shards, reached_at, read_states
from tide_pipeline.capture.recorder import Recorder
from tide_pipeline.capture.rows import bf16_tensor, words_of, write_words
from tide_pipeline.capture.store import Store
from tide_pipeline.contracts import SignalWindow
from tide_pipeline.errors import CorruptShard, LakeError, NotEnoughSignals

DAY = 86_400.0


def write(lake: Path, *names: str, workload: str = "prose", target: str = TARGET, engine_digest: str = ENGINE,
          closed_at: float | None = None) -> Path:
    """One signals shard with these requests."""
    before = set(lake.rglob("*.parquet"))
    recorder = Recorder(SLOW, target, lake, "replica-0", clock=time.time if closed_at is None else lambda: closed_at)
    engine = FakeEngine(recorder)
    recorder.attach(engine.ring, engine_digest)
    for name in names:
        engine.run(name, workload=workload)
    recorder.close()
    (shard,) = {p for p in lake.rglob("*.parquet") if "signals" in p.parts} - before
    return shard


def paths(root: Path) -> list[Path]:
    return [Path(shard) for shard in live_shards(root, TARGET)]


def names(windows: list[SignalWindow]) -> list[str]:
    return [window.request_id for window in windows]


def test_an_empty_lake_says_what_to_do(tmp_path: Path) -> None:
    assert live_shards(tmp_path / "signals", TARGET) == []
    assert count_rows(tmp_path / "signals", TARGET) == 0
    with pytest.raises(NotEnoughSignals, match="serve traffic with capture"):
        list_windows(tmp_path / "signals", TARGET)
    write(tmp_path, "r", target="llama/3")
    with pytest.raises(NotEnoughSignals, match="targets there: llama/3"):
        list_windows(tmp_path / "signals", TARGET)
    assert names(list_windows(tmp_path / "signals", "llama/3").windows) == ["r"]


def test_a_lake_that_can_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Store, "files", denied)
    with pytest.raises(LakeError, match="check that it is there and readable"):
        live_shards(tmp_path, TARGET)


def test_filters(tmp_path: Path) -> None:
    root = tmp_path / "signals"
    write(tmp_path, "a", "b")
    time.sleep(0.002)
    middle = time.time()
    write(tmp_path, "c", workload="code")
    write(tmp_path, "d", engine_digest="another engine")
    assert names(list_windows(root, TARGET).windows) == ["d", "c", "b", "a"]
    assert names(list_windows(root, TARGET, workloads=["code"]).windows) == ["c"]
    assert names(list_windows(root, TARGET, since=middle).windows) == ["d", "c"]
    assert list_windows(root, TARGET, since=time.time() + 7200).windows == []
    only = list_windows(root, TARGET, engine_digest=ENGINE)
    assert names(only.windows) == ["c", "b", "a"] and only.other_engines == 1
    assert names(list_windows(root, TARGET, max_windows=3).windows) == ["d", "c", "b"]
    assert list_windows(root, TARGET, max_windows=0).windows == []
    assert count_rows(root, TARGET) == 52 and count_rows(root, TARGET, workloads=["prose"], engine_digest=ENGINE) == 26


def test_newest_windows_are_found_by_closing_time_not_by_shard(tmp_path: Path) -> None:
    now = time.time()
    write(tmp_path, "recent", closed_at=now - 1)
    write(tmp_path, "late shard, old window", closed_at=now - 50)
    assert names(list_windows(tmp_path / "signals", TARGET, max_windows=1).windows) == ["recent"]


def test_when_a_workload_had_enough_rows(tmp_path: Path) -> None:
    now, root = time.time(), tmp_path / "signals"
    for name, age in (("c", 10.0), ("a", 30.0), ("b", 20.0), ("early", 50.0)):      # 13 rows each
        write(tmp_path, name, closed_at=now - age)
    write(tmp_path, "other", workload="code", closed_at=now - 25.0)
    ask = {"since": now - 40.0, "until": now, "among": 10}
    assert reached_at(root, TARGET, "prose", 13, **ask) == pytest.approx(now - 30.0)
    assert reached_at(root, TARGET, "prose", 14, **ask) == pytest.approx(now - 20.0)
    assert reached_at(root, TARGET, "prose", 39, **ask) == pytest.approx(now - 10.0)
    assert reached_at(root, TARGET, "prose", 40, **ask) is None, "not yet"
    assert reached_at(root, TARGET, "prose", 13, **{**ask, "among": 3}) is None, "more than are looked through"


def test_since_prunes_partitions_without_opening_them(tmp_path: Path) -> None:
    old = write(tmp_path, "old")
    attic = tmp_path / "signals" / f"target={TARGET}" / "date=2020-01-01" / "hour=05"
    attic.mkdir(parents=True)
    old.rename(attic / old.name)
    (attic / "broken.parquet").write_bytes(b"not opened")
    write(tmp_path, "new")
    since = list_windows(tmp_path / "signals", TARGET, since=time.time() - DAY)
    assert names(since.windows) == ["new"] and since.skipped == []
    assert len(list_windows(tmp_path / "signals", TARGET).skipped) == 1


def test_half_written_files_are_not_seen(tmp_path: Path) -> None:
    shard = write(tmp_path, "r")
    data = shard.read_bytes()
    (shard.parent / f".{shard.name}.tmp").write_bytes(data[:100])
    (shard.parent / ".hidden.parquet").write_bytes(data[:100])
    index = list_windows(tmp_path / "signals", TARGET)
    assert names(index.windows) == ["r"] and index.skipped == []


@pytest.mark.parametrize("keep", [0, 3, 400, -1])
def test_truncated_shards_are_skipped_with_a_reason(tmp_path: Path, keep: int) -> None:
    write(tmp_path, "good")
    bad = write(tmp_path, "bad")
    bad.write_bytes(bad.read_bytes()[:keep])
    index = list_windows(tmp_path / "signals", TARGET)
    assert names(index.windows) == ["good"]
    ((path, reason),) = index.skipped
    assert Path(path) == bad and "truncated" in reason
    assert bad not in paths(tmp_path / "signals")


def test_foreign_and_garbled_shards_are_skipped_with_a_reason(tmp_path: Path) -> None:
    good = write(tmp_path, "good")
    pq.write_table(pa.table({"x": [1]}), good.parent / "foreign.parquet")
    (good.parent / "garbled.parquet").write_bytes(b"PAR1" + b"\x00" * 100 + b"PAR1")
    stray = write(tmp_path, "stray", target="other")
    stray.rename(good.parent / stray.name)
    table = pq.ParquetFile(good).read()
    version_3 = table.set_column(0, table.schema.field(0), pa.array([3], pa.int32()))
    pq.write_table(version_3, good.parent / "version3.parquet")
    index = list_windows(tmp_path / "signals", TARGET)
    assert names(index.windows) == ["good"]
    reasons = {path.name: reason for path, reason in index.skipped}
    assert "column 'schema_version' should be int32, is none" in reasons["foreign.parquet"]
    assert "target 'other'" in reasons[stray.name]
    assert "upgrade" in reasons["version3.parquet"]
    assert len(reasons) == 4


def test_damaged_states_are_found_by_their_digest(tmp_path: Path) -> None:
    shard = write(tmp_path, "first", "second")
    needle = states_of("second", [5], HIDDEN * TAPS).view(torch.int16).numpy().tobytes()
    data = bytearray(shard.read_bytes())
    assert data.count(needle) == 1
    data[data.index(needle) + 3] ^= 0x40
    shard.write_bytes(bytes(data))
    windows = list_windows(tmp_path / "signals", TARGET).windows
    told: list[str] = []
    left = list(read_states(windows, on_skip=lambda window, reason: told.append(f"{window.request_id}: {reason}")))
    assert names([states.window for states in left]) == ["first"]
    assert told == ["second: its digest does not match: the file was altered or damaged"]
    with pytest.raises(CorruptShard, match="move the shard out of the lake"):
        list(read_states(windows, strict=True))


def test_shards_that_went_or_changed_after_listing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gone, replaced = write(tmp_path, "gone"), write(tmp_path, "replaced")
    windows = list_windows(tmp_path / "signals", TARGET).windows
    gone.unlink()
    os.replace(write(tmp_path, "successor"), replaced)
    assert list(read_states(windows)) == []
    assert "gone (compacted or deleted)" in caplog.text and "holds another window" in caplog.text
    assert names(list_windows(tmp_path / "signals", TARGET).windows) == ["successor"]


def test_the_same_window_may_be_asked_for_twice(tmp_path: Path) -> None:
    write(tmp_path, "r")
    windows = list_windows(tmp_path / "signals", TARGET).windows
    assert len(list(read_states(windows * 2, strict=True))) == 2


def test_a_compacted_shard_stands_for_what_it_supersedes(tmp_path: Path) -> None:
    root = tmp_path / "signals"
    a, b = write(tmp_path, "a"), write(tmp_path, "b")
    tables = [pq.ParquetFile(path).read() for path in (a, b)]
    schema = tables[0].schema.with_metadata({SUPERSEDES_KEY: json.dumps([a.name, b.name]).encode()})
    compact = root / sealed(successor(str(a.parent.relative_to(root)), written_at(b)), 0)
    pq.write_table(pa.concat_tables([t.replace_schema_metadata(schema.metadata) for t in tables]), compact)
    assert paths(root) == [compact]
    assert sorted(names(list_windows(root, TARGET).windows)) == ["a", "b"]
    compact.write_bytes(compact.read_bytes()[:-9])       # a compacted shard that is no good supersedes nothing
    assert paths(root) == sorted([a, b], key=written_at)


def test_bf16_survives_bit_for_bit() -> None:
    every = torch.arange(-2**15, 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).reshape(256, 256)
    out = bytearray(every.numel() * 2)
    words = words_of(every)
    write_words([words[:100], words[100:]], slice(None), np.frombuffer(out, np.uint8))
    assert out[:4] == b"\x00\x80\x01\x80"                # little-endian, NaNs and infinities included
    assert torch.equal(bf16_tensor(out, 256).view(torch.int16), every.view(torch.int16))


def test_duckdb_and_pyarrow_read_the_lake_without_us(tmp_path: Path) -> None:
    shard = write(tmp_path, "a", "b")
    (shard.parent / f".{shard.name}.tmp").write_bytes(b"half")
    pattern = f"{tmp_path}/signals/**/*.parquet"
    with duckdb.connect() as db:
        rows = db.execute(f"""select target, request_id, num_rows, octet_length(taps), len(token_ids), sampling.seed
                              from read_parquet('{pattern}', hive_partitioning = true) order by request_id""").fetchall()
        assert rows == [(TARGET, "a", 13, 13 * 3 * HIDDEN * 2, 14, 0), (TARGET, "b", 13, 13 * 3 * HIDDEN * 2, 14, 0)]
        first = db.execute(f"""select sum(accepted[1]) / sum(drafted[1]), typeof(any_value(time))
                               from read_parquet('{tmp_path}/acceptance/**/*.parquet', hive_partitioning = true)""").fetchone()
        assert first == (1.0, "TIMESTAMP WITH TIME ZONE")
    table = ds.dataset(tmp_path / "signals", partitioning="hive").to_table(columns=["request_id", "target", "start_pos"])
    assert table.column("target").to_pylist() == [TARGET, TARGET]
