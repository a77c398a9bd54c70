"""The lake as SQL: what the views hold, what they hide, what SQL may not do, and shards that can't be read."""

from __future__ import annotations

import random
import time
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.fakes_capture import FakeEngine, make_recorder
from tests.fakes_drift import TARGET, acceptance_row, config_in, write_log
from tide_pipeline.capture.names import new_shard, sealed
from tide_pipeline.capture.reader import live_shards
from tide_pipeline.capture.schema import ACCEPTANCE_SCHEMA, SIGNALS_SCHEMA
from tide_pipeline.config import TideConfig
from tide_pipeline.drift.views import TEXT_COLUMNS, VIEWS, connect, query, read
from tide_pipeline.errors import InvalidRequest, LakeError


@pytest.fixture
def config(tmp_path: Path) -> TideConfig:
    return config_in(tmp_path)


def shards(config: TideConfig) -> list[Path]:
    return [Path(shard) for shard in live_shards(config.state.acceptance, config.target)]


def one(config: TideConfig, sql: str) -> tuple[object, ...]:
    (row,) = query(config, sql)[1]
    return row


def test_an_empty_lake_has_every_view_and_column(config: TideConfig) -> None:
    columns, rows = query(config, "from acceptance")
    assert columns == [*ACCEPTANCE_SCHEMA.names, "target", "date", "hour"] and rows == []
    assert query(config, "from signals", with_text=True)[0] == [*SIGNALS_SCHEMA.names, "target", "date", "hour"]
    assert query(config, "from requests")[1] == query(config, "from drafts")[1] == query(config, "from skipped")[1] == []
    types = {name: kind for name, kind, *_ in query(config, "describe acceptance")[1]}
    write_log(config, [acceptance_row(1e9)])
    assert {name: kind for name, kind, *_ in query(config, "describe acceptance")[1]} == types


def test_acceptance_has_its_partitions_and_other_targets_stay_out(config: TideConfig) -> None:
    write_log(config, [acceptance_row(1_700_000_000.25)])
    write_log(config, [acceptance_row(1_700_000_000.0)], target="another")
    at, target, date, hour, drafted = one(config, "select time, target, date, hour, drafted from acceptance")
    (shard,) = shards(config)
    assert at.isoformat() == "2023-11-14T22:13:20.250000+00:00" and target == TARGET and drafted == [30, 30, 30]
    assert (f"date={date}", f"hour={hour:02d}") == (shard.parent.parent.name, shard.parent.name)


def test_a_target_with_a_slash_and_a_path_with_a_quote(tmp_path: Path) -> None:
    import dataclasses

    config = dataclasses.replace(config_in(tmp_path / "it's"), engine="llama/3")
    write_log(config, [acceptance_row(1e9)], target="llama/3")
    assert one(config, "select target, count(*) from acceptance group by target") == ("llama/3", 1)


def test_signals_hide_what_is_prompt_text_unless_asked(config: TideConfig) -> None:
    recorder = make_recorder(config.state.lake)
    FakeEngine(recorder).run("r")
    recorder.close()
    columns, rows = query(config, "from signals")
    assert len(rows) == 1 and not set(columns) & set(TEXT_COLUMNS)
    with pytest.raises(InvalidRequest, match="token_ids"):
        query(config, "select token_ids from signals")
    assert len(query(config, "select token_ids from signals", with_text=True)[1][0][0]) == 14
    assert read(config, "select sum(num_rows)::bigint from signals where num_rows > $least", {"least": 1}) == [(13,)]


def test_requests_add_up_blocks(config: TideConfig) -> None:
    write_log(config, [
        acceptance_row(10.0, request_id="a", num_steps=64, drafted=(64, 64, 64), accepted=(48, 32, 16), emitted_tokens=160,
                       finish_reason="", ttft_ms=0.0),
        acceptance_row(11.0, request_id="a", num_steps=6, drafted=(), accepted=(), draft_length=0, emitted_tokens=6,
                       finish_reason="", ttft_ms=0.0),
        acceptance_row(11.0, request_id="a", num_steps=16, drafted=(16,), accepted=(12,), draft_length=1, emitted_tokens=28),
        acceptance_row(12.0, request_id="goes on", finish_reason=""),
        acceptance_row(12.0, request_id="off", drafted=(), accepted=(), draft_length=0, draft_version="", num_steps=5, emitted_tokens=5)])
    names, rows = query(config, "from requests order by request_id")
    a, off = (dict(zip(names, row, strict=True)) for row in rows)
    assert (a["output_tokens"], a["steps"], a["drafted_steps"]) == (195, 86, 80)
    assert a["acceptance_length"] == pytest.approx(1 + 108 / 80) and a["first_position_rate"] == 60 / 80
    assert (a["draft_version"], a["ttft_ms"], a["step_ms"], a["finish_reason"]) == ("v1", 15.0, 1800.0, "length")
    assert (off["output_tokens"], off["acceptance_length"], off["first_position_rate"]) == (6, None, None)


def test_drafts_are_weighted_by_step(config: TideConfig) -> None:
    write_log(config, [acceptance_row(10.0, drafted=(10,), accepted=(10,), num_steps=10),
                       acceptance_row(30.0, drafted=(90,), accepted=(0,)), acceptance_row(20.0, draft_version="v2"),
                       acceptance_row(20.0, draft_version="", drafted=(), accepted=())])
    rows = query(config, "select draft_version, epoch(first_seen), epoch(last_seen), drafted_steps, first_position_rate, acceptance_length "
                         "from drafts order by 1")[1]
    assert rows == [("v1", 10.0, 30.0, 100, 0.1, 1.1), ("v2", 20.0, 20.0, 30, 0.8, pytest.approx(2.8))]


@pytest.mark.parametrize(("sql", "said"), [
    ("selec 1", "syntax error"), ("select nothing_such from acceptance", "views: acceptance, signals"), ("from nowhere", "nowhere"),
    ("drop view acceptance", "got DROP"), ("select 1; select 2", "got SELECT, SELECT"), ("", "got nothing"),
    ("copy (select 1) to 'out.csv'", "got COPY"), ("attach 'other.db'", "got ATTACH"), ("set threads = 4", "got SET"),
    ("create table t (i int)", "got CREATE"), ("select * from read_text('/etc/hostname')", "Cannot access file"),
    ("select * from glob('/etc/*')", "Cannot access file"), ("select 'x'::int", "Could not convert")])
def test_wrong_or_forbidden_sql_is_told_so(config: TideConfig, sql: str, said: str) -> None:
    write_log(config, [acceptance_row(1e9)])
    with pytest.raises(InvalidRequest, match=said):
        query(config, sql)


def test_a_connection_is_confined(config: TideConfig) -> None:
    write_log(config, [acceptance_row(1e9)])
    with connect(config) as connection:
        assert {name for name, *_ in connection.execute("show tables").fetchall()} >= set(VIEWS)
        for sql in ("set enable_external_access = true", "copy acceptance to 'out.parquet'"):
            with pytest.raises(duckdb.Error):
                connection.execute(sql)


def test_half_written_and_foreign_files(config: TideConfig) -> None:
    write_log(config, [acceptance_row(1e9)])
    (good,) = shards(config)
    (good.parent / f".{good.name}.tmp").write_bytes(good.read_bytes()[:100])
    truncated, foreign = (config.state.acceptance / sealed(new_shard(TARGET, name), 0) for name in ("truncated", "foreign"))
    truncated.write_bytes(good.read_bytes()[:-10])
    pq.write_table(pa.table({"time": [1]}), foreign)
    assert one(config, "select count(*) from acceptance") == (1,)
    skipped = dict(query(config, "from skipped")[1])
    assert "not a complete Parquet file" in skipped[str(truncated)] and "'schema_version'" in skipped[str(foreign)] and len(skipped) == 2


def test_damaged_pages_are_left_out_and_reported(config: TideConfig) -> None:
    write_log(config, [acceptance_row(1e9)])
    write_log(config, [acceptance_row(2e9 + i) for i in range(500)])
    bad = shards(config)[-1]
    data = bytearray(bad.read_bytes())
    rng = random.Random(0)
    for i in range(4, len(data) // 2):
        data[i] = rng.randrange(256)
    bad.write_bytes(data)
    assert one(config, "select count(*), max(epoch(time)) from acceptance") == (1, 1e9)
    assert read(config, "select sum(drafted[1])::bigint from acceptance where num_steps > $n", {"n": 0}) == [(30,)]
    ((path, reason),) = query(config, "from skipped")[1]
    assert path == str(bad) and reason.startswith("damaged:")


def test_a_shard_that_goes_between_listing_and_reading(config: TideConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from tide_pipeline.drift import views

    write_log(config, [acceptance_row(1e9)])
    write_log(config, [acceptance_row(2e9)])
    ask = views._ask

    def ask_late(*args: object) -> object:
        shards(config)[-1].unlink(missing_ok=True) if len(shards(config)) == 2 else None
        return ask(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(views, "_ask", ask_late)
    assert read(config, "select count(*) from acceptance where num_steps > $n", {"n": 0}) == [(1,)]


def test_since_leaves_old_shards_alone(config: TideConfig) -> None:
    write_log(config, [acceptance_row(1e9)])
    (shard,) = shards(config)
    attic = config.state.acceptance / f"target={TARGET}" / "date=2020-01-01" / "hour=05"
    attic.mkdir(parents=True)
    shard.rename(attic / shard.name)
    write_log(config, [acceptance_row(2e9)])
    with connect(config, since=time.time() - 3600) as connection:
        assert connection.execute("select count(*) from acceptance").fetchall() == [(1,)]
    assert one(config, "select count(*) from acceptance") == (2,)


def test_our_own_wrong_sql_is_a_lake_error(config: TideConfig) -> None:
    with pytest.raises(LakeError, match="can't query the lake"):
        read(config, "select nothing_such from acceptance", {})
