"""The lake hour by hour, as partitions: which are looked at, what is told of them, and what counts as news. Over a real, small lake."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import dagster as dg
import pytest

from tests.fakes_drift import acceptance_row, write_log
from tests.fakes_training import captured, open_target, tiny_engine, to_lake
from tide_pipeline import recipes
from tide_pipeline.config import TideConfig
from tide_pipeline.definitions import defs
from tide_pipeline.defs.hours import MOST, begins, count_of, due, hour_of, lake_sensor, look_at_hour
from tide_pipeline.defs.keys import PREFIX
from tide_pipeline.defs.lake import HOUR_S, HOURS
from tide_pipeline.defs.resources import TideResource

NOON = begins("2026-11-20-12:00")
REQUESTS, WINDOWS, ROWS = 20, 6, 32


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TideConfig:
    """Twenty requests and six windows of this very moment, in an hour that does not end meanwhile, and one request of an hour before."""
    while not 1 < time.time() % HOUR_S < HOUR_S - 20:
        time.sleep(0.2)
    made, now = tiny_engine(tmp_path), time.time()
    write_log(made, [*(acceptance_row(now - 0.01 * i, workload=("en", "de")[i % 2]) for i in range(REQUESTS)),
                     acceptance_row(now - 5 * HOUR_S, request_id="long ago")], target=made.target)
    to_lake(made, [dataclasses.replace(w, window=dataclasses.replace(w.window, closed_at=now - 0.01 * i))
                   for i, w in enumerate(captured(open_target(made), "de", WINDOWS))])
    recipes.freeze(made, tmp_path / "settings.toml")
    monkeypatch.setenv("TIDE_CONFIG", str(tmp_path / "settings.toml"))
    return made


def tick(cursor: str = "") -> dg.SensorResult:
    result = lake_sensor(dg.build_sensor_context(cursor=cursor, resources={"tide": TideResource()}))
    assert isinstance(result, dg.SensorResult) and result.cursor and result.skip_reason
    return result


def reported(result: dg.SensorResult) -> dict[str, dg.AssetMaterialization]:
    """Of the newest hour in it."""
    assert all(isinstance(event, dg.AssetMaterialization) for event in result.asset_events or [])
    return {event.asset_key.to_user_string(): event for event in result.asset_events or [] if isinstance(event, dg.AssetMaterialization)}


def test_hours_are_the_partitions_of_dagster() -> None:
    assert hour_of(NOON) == hour_of(NOON + HOUR_S - 1) == "2026-11-20-12:00" and begins(hour_of(NOON)) == NOON
    assert HOURS.has_partition_key(hour_of(time.time())) and not HOURS.has_partition_key(hour_of(time.time() + HOUR_S))


def test_the_last_hour_is_looked_at_until_late_rows_are_in_and_a_long_sleep_is_caught_up_with() -> None:
    assert due({}, NOON + 300) == ["2026-11-20-11:00", "2026-11-20-12:00"] and due({}, NOON + 700) == ["2026-11-20-12:00"]
    slept = due({"2026-11-19-23:00": {}}, NOON)
    assert slept == ["2026-11-19-23:00", "2026-11-20-00:00", "2026-11-20-01:00"] and len(slept) == MOST
    assert due({hour: {} for hour in slept}, NOON) == ["2026-11-20-01:00", "2026-11-20-02:00", "2026-11-20-03:00"]


def test_news_are_reported_once_with_figures_that_plot(config: TideConfig) -> None:
    first = tick()
    found = reported(first)
    log, windows = found["acceptance_log"].metadata, found["signal_windows"].metadata
    assert log["requests"].value == REQUESTS and log["first_position_rate"].value == pytest.approx(0.8)
    assert log["acceptance_length"].value == pytest.approx(1 + (24 + 18 + 12) / 30) and log["workloads"].value == "de, en"
    assert windows["rows"].value == WINDOWS * ROWS
    assert all(isinstance(facts["bytes"].value, int) and facts["bytes"].value > 0 for facts in (log, windows))
    assert first.cursor is not None
    again = tick(first.cursor)
    assert not again.asset_events and "nothing new" in str(again.skip_reason)
    write_log(config, [acceptance_row(time.time(), request_id="one more")], target=config.target)
    more = reported(tick(first.cursor))
    assert more.keys() == {"acceptance_log"} and more["acceptance_log"].metadata["requests"].value == REQUESTS + 1


def test_a_foreign_cursor_is_forgotten(config: TideConfig) -> None:
    assert reported(tick('{"yesterday": {}}')).keys() == reported(tick()).keys()
    assert list(json.loads(tick("[").cursor or ""))[-1] == hour_of(time.time())


def test_an_hour_without_traffic_has_no_event(config: TideConfig) -> None:
    assert look_at_hour(config, hour_of(time.time() - 48 * HOUR_S)) == []
    (only,) = look_at_hour(config, hour_of(time.time() - 5 * HOUR_S))
    assert only.asset_key == dg.AssetKey("acceptance_log") and count_of(only) == 1


def test_a_click_on_an_hour_fills_its_partition_in(config: TideConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    job, hour = defs().resolve_job_def("observe_lake"), hour_of(time.time() - 5 * HOUR_S)
    with dg.DagsterInstance.ephemeral() as instance:
        assert job.execute_in_process(instance=instance, partition_key=hour).success
        assert instance.get_materialized_partitions(dg.AssetKey("acceptance_log")) == {hour}
        monkeypatch.setenv(PREFIX, "tiny")
        assert job.execute_in_process(instance=instance).success
        assert instance.get_materialized_partitions(dg.AssetKey(["tiny", "signal_windows"])) == {hour_of(time.time())}
        assert instance.fetch_observations(dg.AssetKey(["tiny", "acceptance_log"]), limit=1).records
