"""Where Dagster keeps runs, events and schedules: SQLite, or PostgreSQL by one setting. dagster_home/dagster.yaml names this class.

    TIDE_DAGSTER_POSTGRES_URL=postgresql://dagster@db.example:5432/dagster     the password in it, in PGPASSWORD or in libpq's password file

Unset or empty is SQLite in `sqlite_dir`. Both are Dagster's own storages as they are; this only chooses. Knows no table.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

from dagster import Field, StringSource
from dagster._core.storage.base_storage import DagsterStorage
from dagster._core.storage.sqlite_storage import DagsterSqliteStorage
from dagster._serdes import ConfigurableClass, ConfigurableClassData

from tide_pipeline.errors import SettingsError

POSTGRES_URL = "TIDE_DAGSTER_POSTGRES_URL"


class ChosenStorage(DagsterStorage, ConfigurableClass):
    """Abstract, and stays it: Dagster calls `from_config_value`, and is given the storage that was chosen."""

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        return {"sqlite_dir": Field(StringSource, description="folder of the SQLite files, while no PostgreSQL is named")}

    @classmethod
    def from_config_value(  # type: ignore[override]  # another of its family, on purpose
        cls, inst_data: ConfigurableClassData, config_value: Mapping[str, Any],
    ) -> DagsterStorage:
        """Raises SettingsError when PostgreSQL is asked for and its package is not there."""
        url = os.environ.get(POSTGRES_URL, "")
        if not url:
            return DagsterSqliteStorage.from_config_value(inst_data, {"base_dir": config_value["sqlite_dir"]})
        try:
            from dagster_postgres import DagsterPostgresStorage
        except ImportError as error:
            raise SettingsError(f"{POSTGRES_URL} is set, but dagster-postgres is not installed: "
                                "pip install 'tide-pipeline[production]'") from error
        chosen: DagsterStorage = DagsterPostgresStorage.from_config_value(inst_data, {"postgres_url": with_driver(url)})
        return chosen


def with_driver(url: str) -> str:
    """SQLAlchemy 2.1 takes psycopg 3 for a bare postgresql://; dagster-postgres brings psycopg2. A driver that was named stays."""
    return re.sub(r"^postgres(ql)?://", "postgresql+psycopg2://", url)
