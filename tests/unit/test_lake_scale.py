"""What keeps a large lake fast and small: listing by hour, remembering the newest, reading an early life once."""

from __future__ import annotations

import io
import random
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import fs

from tests.fakes_capture import TARGET, FakeEngine, make_recorder
from tests.fakes_drift import acceptance_row, config_in, write_log
from tide_pipeline.capture import index as index_module
from tide_pipeline.capture import names
from tide_pipeline.capture import reader as reader_module
from tide_pipeline.capture.compact import compact
from tide_pipeline.capture.index import Memory
from tide_pipeline.capture.layout import first_day, live_shards, newest_first, survey
from tide_pipeline.capture.newest import Newest
from tide_pipeline.capture.reader import count_rows_each, find_again, identity, list_windows
from tide_pipeline.capture.schema import ACCEPTANCE_SCHEMA
from tide_pipeline.capture.sink import Sink
from tide_pipeline.capture.store import Stored, open_store
from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import SignalWindow
from tide_pipeline.drift import early
from tide_pipeline.drift.early import early_life
from tide_pipeline.drift.shards import Part, readable_shards
from tide_pipeline.errors import CorruptShard

HOUR_S, DAY_S = 3600.0, 86_400.0
NOON = time.time() // DAY_S * DAY_S - DAY_S / 2            # yesterday


def at(moment: float) -> Any:
    """Shards are named as if written then."""
    patch = pytest.MonkeyPatch.context()
    then = patch.__enter__()
    then.setattr(names, "time", SimpleNamespace(time_ns=lambda: int(moment * 1e9), time=time.time))
    return patch


def write(lake: Path, name: str, moment: float) -> None:
    patch = at(moment)
    try:
        recorder = make_recorder(lake)
        FakeEngine(recorder).run(name)
        recorder.close()
    finally:
        patch.__exit__(None, None, None)


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    """A shard in each of the hours 10 to 14 of yesterday, two of the day before, and one in the hour after."""
    for hour in (-25.0, -24.0, -2.0, -1.0, 0.0, 1.0, 2.0):
        write(tmp_path / "lake", f"h{hour:+.0f}", NOON + hour * HOUR_S + 60)
    return tmp_path / "lake"


def starts(shards: list[Stored]) -> list[float]:
    return [(names.written_at(shard) - NOON - 60) / HOUR_S for shard in shards]


@pytest.mark.parametrize(("since", "until", "hours"), [
    (None, None, [-25, -24, -2, -1, 0, 1, 2]), (0.0, None, [0, 1, 2]), (0.5, None, [1, 2]), (None, 0.0, [-25, -24, -2, -1]),
    (None, 0.5, [-25, -24, -2, -1, 0]), (-1.0, 1.0, [-1, 0]), (-12.0, 12.0, [-2, -1, 0, 1, 2]), (3.0, None, []), (1.0, 1.0, [])])
def test_shards_of_a_period(lake: Path, since: float | None, until: float | None, hours: list[float]) -> None:
    since_s, until_s = (None if hour is None else NOON + hour * HOUR_S for hour in (since, until))
    assert starts(live_shards(lake / "signals", TARGET, since_s, until_s)) == pytest.approx(hours)


def test_a_period_of_a_compacted_hour_has_all_its_rows_once(lake: Path) -> None:
    """A shard made of others has the time of the newest of them: periods end with hours, or its older rows would be missed."""
    write(lake, "again", NOON + 1800)
    compact(lake, grace_s=0.0)
    before, after = (live_shards(lake / "signals", TARGET, NOON + a * HOUR_S, NOON + b * HOUR_S) for a, b in ((-1, 0.1), (0.1, 1)))
    assert [shard.name.endswith(".compact.parquet") for shard in before] == [False, True]
    assert after == before[1:], "the hour that it cuts, as a whole"


def test_other_days_are_not_looked_into(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    entries = open_store(lake).__class__.files
    monkeypatch.setattr(open_store(lake).__class__, "files",
                        lambda self, folder="", **how: looked.append(folder) or entries(self, folder, **how))
    assert len(live_shards(lake / "signals", TARGET, NOON + 1.5 * HOUR_S)) == 1
    assert [folder[-7:] for folder in looked] == ["hour=13", "hour=14"]
    looked.clear()
    assert [w.request_id for w in list_windows(lake / "signals", TARGET, max_windows=2).windows] == ["h+2", "h+1"]
    assert not any(time.strftime("%Y-%m-%d", time.gmtime(NOON - DAY_S)) in folder for folder in looked)


def test_day_by_day_is_what_a_survey_finds(lake: Path) -> None:
    whole = survey(lake / "signals", TARGET)
    days = list(newest_first(lake / "signals", TARGET))
    assert [shard for day in reversed(days) for shard in day.live] == whole.live and len(days) == 2
    assert first_day(lake / "signals", TARGET) == NOON - 1.5 * DAY_S
    assert first_day(lake / "nothing", TARGET) is None and list(newest_first(lake / "nothing", TARGET)) == []


def test_local_files_are_those_that_pyarrow_lists(lake: Path) -> None:
    (lake / "signals" / "loose").write_bytes(b"1234")
    store = open_store(lake)
    infos = [info for info in fs.LocalFileSystem().get_file_info(fs.FileSelector(str(lake), recursive=True)) if info.is_file]
    expected = sorted((info.path[len(str(lake)) + 1:], info.size, info.mtime_ns) for info in infos)
    assert [(file.key, file.size, file.mtime_ns) for file in store.files(recursive=True)] == expected
    assert sorted(store.keys(recursive=True)) == [key for key, *_ in expected]
    assert [file.key for file in store.files("signals")] == ["signals/loose"] and store.files("nowhere") == []


def test_a_file_is_the_bytes_that_were_written_whatever_their_pieces(tmp_path: Path) -> None:
    store, whole = open_store(tmp_path), io.BytesIO()
    pieces = [bytes([i % 251]) * (i * 37 % 300_000) for i in range(60)]

    def fill(sink: Sink) -> None:
        for piece in pieces:
            sink.stream.write(piece)
            sink.part_done()
            whole.write(piece)
            assert sink.stream.tell() == whole.tell()

    put = store.put("made-{crc:08x}", fill)
    assert store.read_bytes(put.key) == whole.getvalue() and put.size == whole.tell()
    assert put.key == f"made-{zlib.crc32(whole.getvalue()):08x}"


def test_a_file_that_fails_half_way_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    def fill(sink: Sink) -> None:
        sink.stream.write(b"x" * 1_000_000)
        raise pa.ArrowInvalid("no such column")

    with pytest.raises(pa.ArrowInvalid, match="no such column"):
        open_store(tmp_path).put("made", fill)
    assert list(tmp_path.iterdir()) == []


def windows_of_shards(count: int, each: int) -> list[tuple[tuple[Stored, str], tuple[Any, ...]]]:
    store = open_store("nowhere")
    return [((Stored(store, f"t/d/h/r-{i:019d}-c{i:08x}.parquet", 1, 1), TARGET), (None,) * each) for i in range(1, count + 1)]


@pytest.mark.parametrize("order", [1, -1])
def test_what_is_remembered_is_bounded_and_newest(order: int) -> None:
    memory, shards = Memory(1000), windows_of_shards(500, 6)
    for _ in range(2):
        for key, windows in shards[::order]:
            if memory.get(key) is None:
                memory.put(key, windows)
            assert len(memory) <= 1000
    kept = [memory.get(key) is not None for key, _ in shards]
    assert kept == sorted(kept) and 80 <= sum(kept) <= 100, "the newest, and nearly as many as fit"


def test_a_lake_larger_than_the_memory_is_listed_whole(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, opened = index_module._read, []
    monkeypatch.setattr(index_module, "_memory", Memory(12))
    monkeypatch.setattr(index_module, "_read", lambda shard, target: opened.append(shard) or read(shard, target))
    first, second = (list_windows(lake / "signals", TARGET).windows for _ in range(2))
    assert first == second and len(first) == 7
    assert 7 < len(opened) < 14, "some are remembered"


@pytest.fixture
def config(tmp_path: Path) -> TideConfig:
    return config_in(tmp_path, min_steps=200)              # a baseline of 400 steps


def log(config: TideConfig, begin: float, hours: float, every_s: float, **changes: Any) -> None:
    """A request every so often, in a shard of each hour."""
    for hour in range(int(begin // HOUR_S), int((begin + hours * HOUR_S - 1) // HOUR_S) + 1):
        times = [t for t in _times(begin, begin + hours * HOUR_S, every_s) if t // HOUR_S == hour]
        patch = at(max(times) + 1 if times else begin)
        try:
            write_log(config, [acceptance_row(t, request_id=f"{changes}-{t}", **changes) for t in times])
        finally:
            patch.__exit__(None, None, None)


def _times(begin: float, end: float, every_s: float) -> list[float]:
    return [begin + i * every_s for i in range(int((end - begin) / every_s))]


def at_once(config: TideConfig, version: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same from one query over the whole log."""
    with monkeypatch.context() as then:
        then.setattr(early, "_seen", {})
        then.setattr(early, "noted", lambda *_: None)
        then.setattr(early, "_periods", lambda begin, now: [(begin, None)])
        return early_life(config, version, None)


def test_an_early_life_is_read_from_the_first_hours_and_no_further(config: TideConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for hours, version in ((-30.0, "old"), (-6.0, "v1"), (-5.0, "v1"), (-2.0, "v1"), (-1.0, "v2")):
        log(config, NOON + hours * HOUR_S, 1, 100.0, draft_version=version)
    asked: list[tuple[float, float | None]] = []
    read = early.read
    monkeypatch.setattr(early, "read", lambda *args, since, until=None, **how: (
        asked.append((since, until)) or read(*args, since=since, until=until, **how)))
    life = early_life(config, "v1", NOON - 6 * HOUR_S)
    assert life.is_final and max(until or float("inf") for since, until in asked if since != float("inf")) <= NOON - 3 * HOUR_S
    assert life == at_once(config, "v1", monkeypatch) == early_life(config, "v1", None)
    assert life.overall is not None and life.overall.estimate.steps == 420 and life.overall.until == NOON - 6 * HOUR_S + 1300
    asked.clear()
    assert early_life(config, "v1", NOON - 6 * HOUR_S) == life and asked == [], "known"


def test_an_early_life_grows_with_the_log(config: TideConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """`rare` was served early on and hardly since: later looks read what is new, and find what one look at everything finds."""
    clock = SimpleNamespace(time=lambda: NOON)
    monkeypatch.setattr(early, "time", clock)
    log(config, NOON - 2 * HOUR_S, 1, 600.0, workload="rare")
    log(config, NOON - 2 * HOUR_S, 2, 150.0)
    for look in range(6):
        clock.time = lambda look=look: NOON + (look + 1) * HOUR_S
        log(config, NOON + look * HOUR_S, 1, 1500.0, workload="rare", accepted=(20 + look, 5, 1))
        log(config, NOON + look * HOUR_S, 1, 300.0)
        life = early_life(config, "v1", None)
        assert life == at_once(config, "v1", monkeypatch), look
        assert life.overall is not None and life.overall.is_complete
        assert life.is_final == (look >= 3), life.of("rare")
    assert life.of("rare") != life.overall


def test_rows_that_come_late_are_counted_once_and_in_their_place(config: TideConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(time=lambda: NOON + 300)
    monkeypatch.setattr(early, "time", clock)
    log(config, NOON, 1 / 12, 60.0)
    assert early_life(config, "v1", None).overall.estimate.steps == 5 * 30  # type: ignore[union-attr]
    clock.time = lambda: NOON + 600
    patch = at(NOON + 500)
    write_log(config, [acceptance_row(NOON + 30 + i, request_id=f"late {i}") for i in range(4)])
    patch.__exit__(None, None, None)
    life = early_life(config, "v1", None)
    assert life.overall is not None and life.overall.estimate.steps == 9 * 30 and life == at_once(config, "v1", monkeypatch)


def test_only_shards_that_can_hold_the_version_are_opened(config: TideConfig) -> None:
    for i, version in enumerate(("v1", "v2", "v3", "v1")):
        log(config, NOON + i * HOUR_S, 1, 600.0, draft_version=version)
    root = config.state.acceptance
    found = [len(readable_shards(root, TARGET, ACCEPTANCE_SCHEMA, Part(version=version))[0]) for version in (None, "v1", "v2", "v9")]
    assert found == [4, 2, 1, 0]


def test_windows_are_listed_no_further_than_asked(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, opened = index_module._read, []
    monkeypatch.setattr(index_module, "_memory", Memory(1000))
    monkeypatch.setattr(index_module, "_read", lambda shard, target: opened.append(shard) or read(shard, target))
    assert [w.request_id for w in list_windows(lake / "signals", TARGET, among=3).windows] == ["h+2", "h+1", "h+0"] and len(opened) == 3
    assert [w.request_id for w in list_windows(lake / "signals", TARGET, max_each=2).windows] == ["h+2", "h+1"]


def test_rows_are_counted_from_the_newest_on_until_there_are_enough(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lake has a shard of 13 rows in each of seven hours."""
    read, opened = index_module._read, []
    monkeypatch.setattr(index_module, "_read", lambda shard, target: opened.append(shard) or read(shard, target))

    def counted(since: dict[str, float], enough: int = 1_000, among: int = 1_000) -> tuple[dict[str, int], int]:
        monkeypatch.setattr(index_module, "_memory", Memory(1000))
        opened.clear()
        return count_rows_each(lake / "signals", TARGET, since, enough=enough, among=among), len(opened)

    assert counted({"prose": 0.0}) == ({"prose": 91}, 7)
    assert counted({"prose": 0.0, "rare": 0.0}) == ({"prose": 91, "rare": 0}, 7)
    assert counted({"prose": 0.0}, enough=26) == ({"prose": 26}, 2)
    assert counted({"prose": 0.0, "rare": 0.0}, enough=26, among=4) == ({"prose": 26, "rare": 0}, 4)
    assert counted({"prose": NOON + HOUR_S}) == ({"prose": 26}, 2), "folders of earlier hours are not looked into"
    assert counted({"prose": time.time() + 60, "rare": 0.0})[0] == {"prose": 0, "rare": 0}
    assert count_rows_each(lake / "nothing", TARGET, {"prose": 0.0}, enough=1, among=1) == {"prose": 0}
    assert count_rows_each(lake / "signals", TARGET, {}, enough=1, among=1) == {}


def test_a_count_opens_few_shards_and_the_next_one_goes_on(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no look of the drift sensor takes long, whatever was captured before its process started."""
    read, opened = index_module._read, []
    monkeypatch.setattr(index_module, "_memory", Memory(1000))
    monkeypatch.setattr(index_module, "_read", lambda shard, target: opened.append(shard) or read(shard, target))
    monkeypatch.setattr(reader_module, "MOST_OPENED", 3)
    found = []
    for _ in range(4):
        found.append((count_rows_each(lake / "signals", TARGET, {"prose": 0.0}, enough=1_000, among=1_000)["prose"], len(opened)))
    assert found == [(39, 3), (78, 6), (91, 7), (91, 7)]


def test_shards_that_can_not_be_read_hide_no_older_ones(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer than all others, more than one count opens, and tried again by every count."""
    monkeypatch.setattr(index_module, "_memory", Memory(1000))
    monkeypatch.setattr(reader_module, "MOST_OPENED", 3)
    newest, read = live_shards(lake / "signals", TARGET)[-3:], index_module._read

    def refusing(shard: Stored, target: str) -> Any:
        if shard in newest:
            raise CorruptShard("schema version 99")
        return read(shard, target)

    monkeypatch.setattr(index_module, "_read", refusing)
    counts = [count_rows_each(lake / "signals", TARGET, {"prose": 0.0}, enough=1_000, among=1_000)["prose"] for _ in range(4)]
    assert counts == [0, 39, 52, 52]


def test_pinned_windows_are_found_where_compaction_put_them(tmp_path: Path) -> None:
    recorder = make_recorder(tmp_path)
    for i in range(4):
        FakeEngine(recorder).run(f"r{i}")
    recorder.close()
    before = list_windows(tmp_path / "signals", TARGET).windows
    write(tmp_path, "another", time.time() + 1)
    compact(tmp_path, grace_s=0.0)
    pinned = {identity(w) for w in before[1:3]}
    found = find_again(tmp_path / "signals", TARGET, pinned).windows
    assert {identity(w) for w in found} == pinned and [w.request_id for w in found] == [w.request_id for w in before[1:3]]
    assert find_again(tmp_path / "signals", TARGET, set()).windows == []


def test_the_newest_are_kept_whatever_the_order() -> None:
    windows = [SignalWindow("shard", i, f"r{i}", "acme", "en" if i % 3 else "de", "v1", "e", 0, 8, 4, "p", 0.0, float(i))
               for i in range(10_000)]
    random.Random(0).shuffle(windows)
    newest = Newest(most_each=3)
    for window in windows:
        newest.put(window)
    assert [w.closed_at for w in newest.windows()] == [9999, 9998, 9997, 9996, 9995, 9993]
