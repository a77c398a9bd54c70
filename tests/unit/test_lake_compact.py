"""Compaction and retention: nothing lost, nothing twice, whoever writes, reads, compacts or dies meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tests.fakes_capture import TARGET, FakeEngine, make_recorder
from tests.fakes_drift import config_in
from tests.lake_children import compact_for_ever, die_at_every_step, requests_in, start, told, wait_for, write_for_ever
from tide_pipeline.capture import compact as compact_module
from tide_pipeline.capture import names
from tide_pipeline.capture.compact import compact
from tide_pipeline.capture.delete import delete
from tide_pipeline.capture.layout import Listing, live_shards, survey
from tide_pipeline.capture.lease import maintenance
from tide_pipeline.capture.names import ORIGINS_KEY
from tide_pipeline.capture.reader import list_windows, read_states
from tide_pipeline.capture.retain import DAY_S, Retention, retain
from tide_pipeline.capture.rewrite import replace
from tide_pipeline.capture.schema import SIGNALS_SCHEMA
from tide_pipeline.capture.store import open_store
from tide_pipeline.capture.tombstones import windows_of
from tide_pipeline.cli import app
from tide_pipeline.drift.views import query


def write(lake: Path, name: str, at: float | None = None) -> None:
    """One request in shards of its own, written at `at`."""
    with pytest.MonkeyPatch.context() as then:
        if at is not None:
            then.setattr(names, "time", SimpleNamespace(time_ns=lambda: int(at * 1e9)))
        recorder = make_recorder(lake)
        FakeEngine(recorder).run(name, tenant=name.partition("_")[0])
        recorder.close()


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    """Five shards of an hour yesterday, and one of now."""
    hour = (time.time() - DAY_S) // 3600 * 3600
    for i in range(5):
        write(tmp_path / "lake", f"old_{i}", hour + i)
    write(tmp_path / "lake", "new_0")
    return tmp_path / "lake"


def files(lake: Path) -> int:
    return len(list((lake / "signals").rglob("*.parquet")))


def test_an_hour_becomes_one_shard_and_the_same_windows(lake: Path) -> None:
    before = {s.window.request_id: s for s in read_states(list_windows(lake / "signals", TARGET).windows, strict=True)}
    since = list_windows(lake / "signals", TARGET, since=time.time() - 3600).windows
    done = compact(lake)
    assert (done.compacted_shards, done.new_shards, done.removed_files) == (10, 2, 0)
    old, new = live_shards(lake / "signals", TARGET)
    assert old.name.endswith(".compact.parquet") and not new.name.endswith(".compact.parquet")
    after = list(read_states(list_windows(lake / "signals", TARGET).windows, strict=True))
    assert len(after) == len(before) == 6
    assert all(s.taps_TG.equal(before[s.window.request_id].taps_TG) and s.window.closed_at == before[s.window.request_id].window.closed_at
               for s in after)
    assert {w.request_id for w in list_windows(lake / "signals", TARGET, since=time.time() - 3600).windows} >= {w.request_id for w in since}
    assert files(lake) == 7, "readers that have listed the old ones can go on"
    assert compact(lake).new_shards == 0
    assert compact(lake, grace_s=0.0).removed_files == 10 and files(lake) == 2
    assert len(requests_in(lake)) == 6
    assert not [p for p in lake.rglob("*") if p.is_file() and p.stat().st_mode & 0o077]


def test_sizes_and_open_hours(lake: Path) -> None:
    size = live_shards(lake / "signals", TARGET)[0].size
    for i in range(compact_module.MIN_SHARDS):
        write(lake, f"more_{i}")
    compact(lake, target_bytes=int(size * 2.5))
    old = [shard for shard in live_shards(lake / "signals", TARGET) if shard.folder == live_shards(lake / "signals", TARGET)[0].folder]
    assert [shard.name.endswith(".compact.parquet") for shard in old].count(True) == 2 and len(old) == 3
    assert len(requests_in(lake)) == 6 + compact_module.MIN_SHARDS


def test_compacted_shards_are_compacted_again_and_rows_keep_their_first_address(lake: Path) -> None:
    first = {shard.name for shard in live_shards(lake / "signals", TARGET)}
    compact(lake)
    write(lake, "late_0", at=(time.time() - DAY_S) // 3600 * 3600 + 60)
    once = live_shards(lake / "signals", TARGET)[0]
    compact(lake)                                          # its sources are still there: they stay superseded
    assert requests_in(lake) == Counter(["new_0", "late_0", *(f"old_{i}" for i in range(5))])
    twice = live_shards(lake / "signals", TARGET)[0]
    with twice.open() as stream:
        runs = json.loads(pq.read_metadata(stream).metadata[ORIGINS_KEY])
    assert {name for name, *_ in runs} >= {once.name} and len({name for name, *_ in runs} & first) == 5
    assert compact(lake, grace_s=0.0).removed_files == 14 and len(requests_in(lake)) == 7
    delete(lake, request_id="old_3", settle_s=0.0)
    (window,) = windows_of(open_store(lake / "signals"), request_id="old_3", tenant=None)
    assert window[0][0] in first and window[-1] == (twice.name, 3)


def test_a_damaged_shard_is_left_out(lake: Path) -> None:
    bad = Path(live_shards(lake / "signals", TARGET)[2])
    data = bytearray(bad.read_bytes())
    data[200] ^= 1
    bad.write_bytes(bytes(data))
    done = compact(lake, grace_s=0.0)
    assert [Path(file) for file, _ in done.damaged] == [bad] and bad.exists()
    assert len(list_windows(lake / "signals", TARGET).windows) >= 5


def compact_all(lake: Path) -> None:
    compact(lake, grace_s=0.0, settle_s=0.0)


def test_dying_at_any_step_of_a_compaction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    for i in range(3):
        write(tmp_path / "template", f"r_{i}", time.time() - DAY_S)
    shutil.rmtree(tmp_path / "template" / "acceptance")
    everything = Counter([f"r_{i}" for i in range(3)])
    lakes = die_at_every_step(tmp_path / "lakes", compact_all, tmp_path / "template")
    counts = set()
    for copy in lakes:
        assert requests_in(copy) == everything
        counts.add(files(copy))
        compact_all(copy)
        assert requests_in(copy) == everything and files(copy) == 1
    assert counts == {1, 2, 3, 4} and len(lakes) > 5


def test_two_makers_of_the_same_shards_count_once(lake: Path) -> None:
    listing, everything = survey(lake / "signals", TARGET), requests_in(lake)
    with maintenance(open_store(lake / "signals")) as lease:           # as if claims had failed
        replace(lease, listing, listing.live[:3], TARGET, SIGNALS_SCHEMA)
        replace(lease, listing, listing.live[1:5], TARGET, SIGNALS_SCHEMA)
    found: Listing = survey(lake / "signals", TARGET)
    assert ["repeats rows" in why for _, why in found.skipped] == [True]
    assert Counter(w.request_id for w in list_windows(lake / "signals", TARGET).windows) == everything


def test_writers_readers_and_two_compactors_at_once(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    lake = config.state.lake
    lake.parent.mkdir()
    workers = [start(write_for_ever, lake, "w0"), start(write_for_ever, lake, "w1"), start(compact_for_ever, lake),
               start(compact_for_ever, lake)]
    try:
        wait_for(lambda: any(name.endswith(".compact.parquet") for shard in live_shards(lake / "signals", TARGET) for name in [shard.name]))
        end, looks = time.monotonic() + 4.0, 0
        while time.monotonic() < end or looks < 5:
            promised = told(lake)
            windows = Counter(w.request_id for w in list_windows(lake / "signals", TARGET).windows)
            assert promised <= set(windows) and set(windows.values()) == {1}
            looks += 1
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    for path in (lake / "signals" / "_maintenance", lake / "acceptance" / "_maintenance"):
        assert len([p for p in path.iterdir() if p.suffix == ".json"]) <= 2, "claims of the dead"
    compact(lake, grace_s=0.0, settle_s=0.0)               # which hold nobody up
    seen = requests_in(lake)
    assert told(lake) <= set(seen) and set(seen.values()) == {1}
    rows = query(config, "select request_id, count(*) from acceptance group by 1")[1]
    assert told(lake) <= {name for name, _ in rows} and {count for _, count in rows} == {1}


def test_retention_by_age_bytes_and_tenant(lake: Path) -> None:
    write(lake, "acme_1", time.time() - 3 * DAY_S)
    compact(lake)
    done = retain(lake, Retention(signals_age_s=2 * DAY_S), settle_s=0.0)
    assert done.expired_shards == 1 and set(requests_in(lake)) == {"new_0", *(f"old_{i}" for i in range(5))}
    assert len(live_shards(lake / "acceptance", TARGET)) == 3 and len(list((lake / "signals").rglob("date=*"))) == 2
    assert retain(lake, Retention(acceptance_age_s=2 * DAY_S), settle_s=0.0).expired_shards == 1
    done = retain(lake, Retention(tenant_age_s={"new": 0.0}), settle_s=0.0)
    assert done.signal_rows == 1 and done.acceptance_rows == 1 and "new_0" not in requests_in(lake)
    size = done.left_bytes["signals"]
    assert retain(lake, Retention(signals_bytes=size), settle_s=0.0).expired_shards == 0
    done = retain(lake, Retention(signals_bytes=size - 1), settle_s=0.0)
    assert done.expired_shards == 1 and done.left_bytes["signals"] == 0 and requests_in(lake) == Counter(), "with all that it stood for"


def test_the_commands(lake: Path) -> None:
    os.rename(lake.parent / "lake", (lake.parent / "state").mkdir() or lake.parent / "state" / "lake")
    run = CliRunner().invoke
    said = run(app, ["signals", "compact", "--state", str(lake.parent / "state"), "--json"])
    assert said.exit_code == 0 and json.loads(said.stdout)["compacted_shards"] == 10, said.output
    said = run(app, ["signals", "retain", "--signal-days", "0.5", "--tenant", "new=1", "--state", str(lake.parent / "state")])
    assert said.exit_code == 0 and "expired 1 shards" in said.output, said.output
    for words, error in (((), "say what to keep"), (("--set", "retention.drafts_keep=3"), "say what to keep"),
                         (("--tenant", "acme"), "expected NAME=DAYS")):
        said = run(app, ["signals", "retain", *words, "--state", str(lake.parent / "state")])
        assert said.exit_code == 2 and error in said.stderr
