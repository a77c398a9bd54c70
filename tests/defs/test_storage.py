"""Dagster's storage by one setting: SQLite without it, and a real PostgreSQL, where its programs are installed, with it."""

import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from tests import postgres
from tide_pipeline.config import project_root
from tide_pipeline.defs.storage import POSTGRES_URL, with_driver
from tide_pipeline.errors import SettingsError


@dg.op
def count(context: dg.OpExecutionContext) -> int:
    context.log_event(dg.AssetObservation("signal_windows", metadata={"rows": 41}))
    return 42


@dg.job
def counting() -> None:
    count()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """dagster_home/dagster.yaml itself, with its data in `tmp_path`."""
    monkeypatch.setenv("DAGSTER_HOME", str(project_root() / "dagster_home"))
    monkeypatch.setenv("TIDE_DAGSTER_DIR", str(tmp_path / "dagster"))
    monkeypatch.setenv("TIDE_DAGSTER_LOGS", str(tmp_path / "dagster" / "logs"))
    monkeypatch.delenv(POSTGRES_URL, raising=False)
    return tmp_path / "dagster"


@pytest.fixture(scope="module")
def database() -> Iterator[postgres.Server]:
    if postgres.programs() is None:
        pytest.skip("no PostgreSQL server programs here (Debian, Ubuntu: apt install postgresql)")
    with postgres.server("secret") as running:
        running.psql("create database dagster")
        yield running


def play() -> tuple[str, int]:
    """A job on the instance of the environment, read back by a second one: (kind of storage, rows observed)."""
    with dg.DagsterInstance.get() as instance:
        assert counting.execute_in_process(instance=instance).success
    with dg.DagsterInstance.get() as again:
        run, = again.get_runs()
        assert run.status == dg.DagsterRunStatus.SUCCESS
        event, = again.fetch_observations(dg.AssetKey("signal_windows"), limit=1).records
        assert event.asset_observation is not None
        return type(again.run_storage).__name__, int(str(event.asset_observation.metadata["rows"].value))


def test_sqlite_is_the_default(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert play() == ("SqliteRunStorage", 41) and (home / "history" / "runs.db").is_file()
    monkeypatch.setenv(POSTGRES_URL, "")
    with dg.DagsterInstance.get() as instance:
        assert len(instance.get_runs()) == 1, "empty is unset"


def test_postgres_by_one_setting(home: Path, database: postgres.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(POSTGRES_URL, f"postgresql://postgres@127.0.0.1:{database.port}/dagster")
    monkeypatch.setenv("PGPASSWORD", database.password)
    assert play() == ("PostgresRunStorage", 41) and not list(home.rglob("*.db"))
    assert database.psql("select status from runs", database="dagster") == "SUCCESS"


def test_what_is_missing_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(POSTGRES_URL, "postgresql://nobody@127.0.0.1:1/dagster")
    monkeypatch.setitem(sys.modules, "dagster_postgres", None)
    with pytest.raises(SettingsError, match=r"pip install 'tide-pipeline\[production\]'"):
        dg.DagsterInstance.get()


def test_a_driver_that_was_named_stays() -> None:
    assert with_driver("postgresql://a@b/c") == with_driver("postgres://a@b/c") == "postgresql+psycopg2://a@b/c"
    assert with_driver("postgresql+psycopg://a@b/c") == "postgresql+psycopg://a@b/c"
