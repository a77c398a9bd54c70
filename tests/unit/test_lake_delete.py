"""Deletion: every row of every shard, whoever reads; late rows; dying on the way; what is left for statistics."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.fakes_capture import TARGET, FakeEngine, make_recorder
from tests.fakes_drift import config_in
from tests.lake_children import die_at_every_step, requests_in
from tide_pipeline.capture import sweep as sweep_module
from tide_pipeline.capture.compact import compact
from tide_pipeline.capture.delete import delete
from tide_pipeline.capture.layout import live_shards, survey
from tide_pipeline.capture.lease import maintenance
from tide_pipeline.capture.reader import list_windows, read_states
from tide_pipeline.capture.store import open_store
from tide_pipeline.capture.tombstones import read_tombstones
from tide_pipeline.drift.views import query
from tide_pipeline.errors import LakeError

REQUESTS = ("alpha_1", "alpha_2", "bravo_1", "bravo_2", "bravo_3")                  # tenant and number


def write(lake: Path, *names: str) -> None:
    recorder = make_recorder(lake)
    engine = FakeEngine(recorder)
    for name in names:
        engine.run(name, tenant=name.partition("_")[0])
    recorder.close()


def fill(lake: Path) -> None:
    """Two shards in each dataset."""
    write(lake, "alpha_1", "bravo_1", "alpha_2")
    write(lake, "bravo_2", "bravo_3")


def delete_b1(lake: Path) -> None:
    delete(lake, request_id="bravo_1", settle_s=0.0)


def bytes_of(lake: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(lake.rglob("*")) if path.is_file())


def test_a_request_goes_from_everything(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    lake = config.state.lake
    fill(lake)
    before = {s.window.request_id: s for s in read_states(list_windows(lake / "signals", TARGET).windows)}
    first, second = live_shards(lake / "signals", TARGET)
    done = delete(lake, request_id="bravo_1", settle_s=0.0)
    assert done.is_complete and (done.signal_rows, done.acceptance_rows, done.windows) == (1, 1, {((first.name, 1),)})
    assert set(requests_in(lake)) == {"alpha_1", "alpha_2", "bravo_2", "bravo_3"}
    assert second in live_shards(lake / "signals", TARGET) and len(survey(lake / "signals", TARGET).superseded) == 0
    for states in read_states(list_windows(lake / "signals", TARGET).windows, strict=True):
        assert states.taps_TG.equal(before[states.window.request_id].taps_TG)
    rows = query(config, "select request_id, tenant, output_tokens from requests order by 1")[1]
    assert [row[0] for row in rows][:4] == ["alpha_1", "alpha_2", "bravo_2", "bravo_3"]
    assert rows[4][0].startswith("deleted-") and rows[4][1:] == ("deleted", 10)
    again = delete(lake, request_id="bravo_1", settle_s=0.0)
    assert (again.signal_rows, again.acceptance_rows, again.removed_files, again.windows) == (0, 0, 0, done.windows)


def test_a_tenant_goes_and_nothing_names_it(tmp_path: Path) -> None:
    fill(tmp_path)
    done = delete(tmp_path, tenant="bravo", settle_s=0.0)
    assert (done.signal_rows, done.acceptance_rows, len(done.windows)) == (3, 3, 3)
    assert requests_in(tmp_path) == Counter(alpha_1=1, alpha_2=1)
    assert len(live_shards(tmp_path / "signals", TARGET)) == 1, "a shard that held nothing else is gone"
    left = bytes_of(tmp_path)
    assert not any(name.encode() in left for name in ("bravo_1", "bravo_2", "bravo_3")) and b"alpha_1" in left
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_mode & 0o077] == []


def test_what_arrives_late_is_hidden_and_then_removed(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    lake = config.state.lake
    recorder = make_recorder(lake)
    engine = FakeEngine(recorder)
    engine.run("bravo_1", tenant="bravo")                           # still in the writer's queue
    delete(lake, tenant="bravo", settle_s=0.0)
    delete(lake, request_id="alpha_9", settle_s=0.0)
    engine.run("alpha_9", tenant="alpha")
    engine.run("alpha_1", tenant="alpha")
    recorder.close()
    assert requests_in(lake) == {"alpha_1": 1}
    assert query(config, "select request_id from signals")[1] == [("alpha_1",)]
    delete(lake, request_id="another", settle_s=0.0)       # any maintenance carries out all tombstones
    assert b"bravo_1" not in bytes_of(lake) and b"alpha_9" not in bytes_of(lake) and requests_in(lake) == {"alpha_1": 1}


def test_a_tenant_that_comes_back_later_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    with monkeypatch.context() as earlier:
        now = time.time()
        earlier.setattr("tide_pipeline.capture.delete.time.time", lambda: now - 7200)
        delete(tmp_path, tenant="bravo", settle_s=0.0)
    assert "bravo_2" in requests_in(tmp_path), "it came an hour after the deletion"
    assert read_tombstones(tmp_path / "signals")


def test_dying_at_any_step_of_a_deletion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)       # only a power cut needs it
    fill(tmp_path / "template")
    shutil.rmtree(tmp_path / "template" / "acceptance")    # the other dataset goes the same way
    everything = Counter(REQUESTS)
    seen = []
    for lake in die_at_every_step(tmp_path / "lakes", delete_b1, tmp_path / "template"):
        found = requests_in(lake)                          # whole shards, no window twice
        assert found in (everything, everything - Counter(["bravo_1"]))
        seen.append("bravo_1" in found)
        done = delete(lake, request_id="bravo_1", settle_s=0.0)
        assert requests_in(lake) == everything - Counter(["bravo_1"])
        assert b"bravo_1" not in bytes_of(lake) or [f for f in done.unfinished if b"bravo_1" in Path(f).read_bytes()]
        assert len(done.windows) == 1, "known for the report of drafts, whatever happened"
    assert seen[0] and not seen[-1] and seen == sorted(seen, reverse=True) and len(seen) > 15


def test_files_that_can_not_be_read_are_named(tmp_path: Path) -> None:
    fill(tmp_path)
    shard = Path(live_shards(tmp_path / "signals", TARGET)[0])
    shard.write_bytes(shard.read_bytes()[:-3])
    done = delete(tmp_path, request_id="bravo_1", settle_s=0.0)
    assert not done.is_complete and [Path(file) for file, _ in done.unreadable] == [shard]


def test_leftovers_of_a_crash_go_after_an_hour(tmp_path: Path) -> None:
    fill(tmp_path)
    folder = Path(live_shards(tmp_path / "signals", TARGET)[0]).parent
    for name, age_s in ((".old.tmp", 4000), (".young.tmp", 10)):
        (folder / name).write_bytes(b"bravo_1")
        os.utime(folder / name, (time.time() - age_s,) * 2)
    done = delete(tmp_path, request_id="bravo_1", settle_s=0.0)
    assert [file.name for file in done.unfinished] == [".young.tmp"] and not (folder / ".old.tmp").exists()


def test_old_shards_are_looked_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    delete(tmp_path, request_id="bravo_1", settle_s=0.0)
    long_ago = time.time() - 7200
    for path in tmp_path.rglob("*.parquet"):
        os.utime(path, (long_ago, long_ago))
    write(tmp_path, "bravo_1", "alpha_3")                  # late
    looked: list[str] = []
    read = sweep_module.read_groups
    monkeypatch.setattr(sweep_module, "read_groups", lambda shard, columns: looked.append(shard.key) or read(shard, columns))
    compact(tmp_path, settle_s=0.0)
    assert len(looked) == 2 and requests_in(tmp_path)["alpha_3"] == 1 and b"bravo_1" not in bytes_of(tmp_path)
    looked.clear()
    delete(tmp_path, request_id="bravo_2", settle_s=0.0)   # another tombstone: everything again
    assert len(looked) >= 6 and b"bravo_2" not in bytes_of(tmp_path)


def test_one_maintenance_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    with maintenance(store), pytest.raises(LakeError, match="somebody else is rewriting"), maintenance(store, wait_s=0.0):
        raise AssertionError("two at once")
    store.put_bytes("_maintenance/dead.json", b'{"at": 9e18, "pid": 0, "machine": "elsewhere"}')
    with pytest.raises(LakeError), maintenance(store, wait_s=0.0):
        raise AssertionError("held by another machine")
    store.put_bytes("_maintenance/dead.json", b'{"at": 1.0, "pid": 0, "machine": "elsewhere"}')
    with maintenance(store, wait_s=0.0) as lease:
        assert [file.name for file in store.files("_maintenance")] != ["dead.json"]
        monkeypatch.setattr("tide_pipeline.capture.lease.TTL_S", 0.0)
        with pytest.raises(LakeError, match="run it again"):
            lease.check()
    assert store.files("_maintenance") == []
