"""The lake as SQL views in an in-memory DuckDB. Knows Parquet, SQL and which files may be read; decides nothing.

    acceptance   every column of docs/signals.md, and target, date, hour
    signals      the same without what is prompt text (token_ids, rejected, taps, final); `with_text` brings it back
    requests     one row per finished request
    drafts       one row per draft version
    skipped      shards that were left out, and why

Times are UTC. DuckDB is confined to the live shards of one target: no other file, no network, no change of settings.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import duckdb

from tide_pipeline.capture.schema import ACCEPTANCE_SCHEMA, SIGNALS_SCHEMA
from tide_pipeline.config import TideConfig
from tide_pipeline.drift.shards import find_damage, readable_shards
from tide_pipeline.errors import InvalidRequest, LakeError

T = TypeVar("T")

SCHEMAS = {"acceptance": ACCEPTANCE_SCHEMA, "signals": SIGNALS_SCHEMA}
TEXT_COLUMNS = ("token_ids", "rejected", "taps", "final")
PARTITIONS = {"target": "varchar", "date": "date", "hour": "integer"}
VIEWS = ("acceptance", "signals", "requests", "drafts", "skipped")

REQUESTS = """
create view requests as
select request_id, workload, tenant, replica, max(draft_version) as draft_version, any_value(speculation) as speculation,
       any_value(temperature) as temperature, max(time) as finished_at, max(finish_reason) as finish_reason,
       any_value(num_prompt_tokens) as num_prompt_tokens, 1 + sum(emitted_tokens)::bigint as output_tokens,
       sum(num_steps)::bigint as steps, sum(coalesce(drafted[1], 0))::bigint as drafted_steps,
       1 + sum(list_sum(accepted)) / nullif(sum(drafted[1]), 0) as acceptance_length,
       sum(accepted[1]) / nullif(sum(drafted[1]), 0) as first_position_rate, max(ttft_ms) as ttft_ms, sum(duration_ms) as step_ms
from acceptance group by request_id, workload, tenant, replica having max(finish_reason) <> ''
"""
DRAFTS = """
create view drafts as
select draft_version, min(time) as first_seen, max(time) as last_seen, count(distinct request_id) as requests,
       sum(num_steps)::bigint as steps, sum(coalesce(drafted[1], 0))::bigint as drafted_steps,
       1 + sum(list_sum(accepted)) / nullif(sum(drafted[1]), 0) as acceptance_length,
       sum(accepted[1]) / nullif(sum(drafted[1]), 0) as first_position_rate
from acceptance where draft_version <> '' group by draft_version
"""

_log = logging.getLogger(__name__)


def connect(config: TideConfig, *, since: float | None = None, with_text: bool = False, threads: int = 1) -> Any:
    """A DuckDB connection with VIEWS over the live shards of `config.target`; with `since`, those that can hold rows closed after it.

    An empty lake gives empty views. Close the connection after use. Raises LakeError when the lake can't be listed.
    """
    connection = duckdb.connect(":memory:", config={"threads": threads, "temp_directory": ""})
    connection.execute("set TimeZone = 'UTC'")
    skipped, allowed = [], []
    for name, root in (("acceptance", config.state.acceptance), ("signals", config.state.signals)):
        files, left_out = readable_shards(root, config.target, SCHEMAS[name], since)
        _create_view(connection, name, files, with_text)
        skipped += left_out
        allowed += files
    connection.execute(REQUESTS)
    connection.execute(DRAFTS)
    connection.execute("create table skipped (path varchar, reason varchar)")
    if skipped:
        connection.executemany("insert into skipped values (?, ?)", [[str(path), why] for path, why in skipped])
        _log.warning("left out %d shards of the lake (`tide sql \"from skipped\"`), the first: %s: %s", len(skipped), *skipped[0])
    _confine(connection, allowed)
    return connection


def query(config: TideConfig, sql: str, *, with_text: bool = False) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Column names and rows of one statement that only reads; `with_text` adds the columns of `signals` that are prompt text.

    Raises InvalidRequest for SQL that is wrong or does anything but read.
    """
    def ask(connection: Any) -> tuple[list[str], list[tuple[Any, ...]]]:
        answer = connection.execute(sql)
        return [column[0] for column in answer.description], answer.fetchall()

    _check_reads_only(sql)
    try:
        return _without_damage(config, ask, None, with_text)
    except duckdb.Error as error:
        raise InvalidRequest(f"{error}\nviews: {', '.join(VIEWS)}; `describe <view>` lists its columns") from error


def read(config: TideConfig, sql: str, parameters: Mapping[str, Any], *, since: float | None = None) -> list[tuple[Any, ...]]:
    """Rows of one of our own queries. Raises LakeError when the lake can't be read."""
    try:
        return _without_damage(config, lambda connection: connection.execute(sql, dict(parameters)).fetchall(), since, False)
    except duckdb.Error as error:
        raise LakeError(f"can't query the acceptance log under {config.state.acceptance}: {error}") from error


def _without_damage(config: TideConfig, ask: Callable[[Any], T], since: float | None, with_text: bool) -> T:
    """Ask; when that fails and shards turn out damaged (or gone meanwhile), ask again without them."""
    with connect(config, since=since, with_text=with_text) as connection:
        try:
            return ask(connection)
        except duckdb.Error:
            roots = (config.state.acceptance, config.state.signals)
            if not any([find_damage(root, config.target, since) for root in roots]):     # a list: look in both
                raise
    with connect(config, since=since, with_text=with_text) as connection:
        return ask(connection)


def _check_reads_only(sql: str) -> None:
    try:
        statements = duckdb.extract_statements(sql)
    except duckdb.Error as error:
        raise InvalidRequest(str(error)) from error
    kinds = [statement.type for statement in statements]
    if len(kinds) != 1 or kinds[0] not in (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN):
        found = ", ".join(kind.name for kind in kinds) or "nothing"
        raise InvalidRequest(f"expected one statement that reads (select, from, describe, summarize, explain), got {found}")


def _create_view(connection: Any, name: str, files: list[str], with_text: bool) -> None:
    schema = SCHEMAS[name]
    columns = [column for column in schema.names if with_text or column not in TEXT_COLUMNS]
    wanted = ", ".join(f'"{column}"' for column in (*columns, *PARTITIONS))
    if files:
        kinds = ", ".join(f"'{column}': {kind}" for column, kind in PARTITIONS.items())
        source = f"read_parquet({_text_list(files)}, hive_partitioning = true, hive_types = {{{kinds}}})"
    else:
        connection.register(f"no_{name}", schema.empty_table())
        source = f"(select *, {', '.join(f'null::{kind} as {column}' for column, kind in PARTITIONS.items())} from no_{name})"  # noqa: S608
    connection.execute(f"create view {name} as select {wanted} from {source}")  # noqa: S608 - names of ours, paths quoted


def _confine(connection: Any, files: list[str]) -> None:
    connection.execute(f"set allowed_paths = {_text_list(files)}")
    for setting in ("enable_external_access = false", "lock_configuration = true"):
        connection.execute(f"set {setting}")


def _text_list(values: list[str]) -> str:
    return "[" + ", ".join("'" + value.replace("'", "''") + "'" for value in values) + "]"
