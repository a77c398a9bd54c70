"""The lake as SQL views in an in-memory DuckDB. Knows Parquet, SQL and which files may be read; decides nothing.

    acceptance   every column of docs/signals.md, and target, date, hour
    signals      the same without what tells of prompts (token_ids, prompt_digest, rejected, taps, final); `with_text` brings it back
    requests     one row per finished request
    drafts       one row per draft version
    skipped      shards that were left out, and why

Times are UTC. People's SQL is confined: only live shards of one target can be read, no other file, no network, no settings.
DuckDB does not check page checksums: a damaged page counts as damaged when it can't be decoded.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import duckdb

from tide_pipeline.capture import encryption
from tide_pipeline.capture.schema import ACCEPTANCE_SCHEMA, SIGNALS_SCHEMA
from tide_pipeline.capture.store import Stored, is_away
from tide_pipeline.capture.tombstones import read_tombstones
from tide_pipeline.config import TideConfig
from tide_pipeline.drift.shards import Part, find_damage, readable_shards, through_pyarrow
from tide_pipeline.errors import InvalidRequest, LakeAway, LakeError

Answer = tuple[list[str], list[tuple[Any, ...]]]       # column names, rows

SCHEMAS = {"acceptance": ACCEPTANCE_SCHEMA, "signals": SIGNALS_SCHEMA}
TEXT_COLUMNS = ("token_ids", "prompt_digest", "rejected", "taps", "final")
PARTITIONS = {"target": "varchar", "date": "date", "hour": "integer"}
VIEWS = ("acceptance", "signals", "requests", "drafts", "skipped")

# What DuckDB raises for SQL that is wrong, whatever the shards hold.
_WRONG_SQL = (duckdb.ParserException, duckdb.SyntaxException, duckdb.BinderException, duckdb.CatalogException, duckdb.PermissionException,
              duckdb.ConversionException, duckdb.OutOfRangeException, duckdb.NotImplementedException)

# Acceptance by step, not by request; both figures over steps that drafted, so that the speculation controller can't move them.
_RATES = """
       1 + sum(list_sum(accepted)) / nullif(sum(drafted[1]), 0) as acceptance_length,
       sum(accepted[1]) / nullif(sum(drafted[1]), 0) as first_position_rate"""
_REQUESTS = f"""
create temp view requests as
select request_id, workload, tenant, replica, max(draft_version) as draft_version, any_value(speculation) as speculation,
       any_value(temperature) as temperature, max(time) as finished_at, max(finish_reason) as finish_reason,
       any_value(num_prompt_tokens) as num_prompt_tokens, 1 + sum(emitted_tokens)::bigint as output_tokens,
       sum(num_steps)::bigint as steps, sum(coalesce(drafted[1], 0))::bigint as drafted_steps, {_RATES},
       max(ttft_ms) as ttft_ms, sum(duration_ms) as step_ms
from acceptance group by request_id, workload, tenant, replica having max(finish_reason) <> ''
"""  # noqa: S608 - no value of anyone's in it
_DRAFTS = f"""
create temp view drafts as
select draft_version, min(time) as first_seen, max(time) as last_seen, count(distinct request_id) as requests,
       sum(num_steps)::bigint as steps, sum(coalesce(drafted[1], 0))::bigint as drafted_steps, {_RATES}
from acceptance where draft_version <> '' group by draft_version
"""  # noqa: S608

_log = logging.getLogger(__name__)


def connect(config: TideConfig, *, since: float | None = None, with_text: bool = False, threads: int = 1) -> Any:
    """A confined DuckDB connection with VIEWS over the live shards of `config.target`; with `since`, those with rows closed after it.

    An empty lake gives empty views. Close the connection after use. Raises LakeError when the lake can't be listed.
    """
    connection = duckdb.connect(":memory:", config={"threads": threads, "temp_directory": ""})
    files = _create_views(connection, config, Part(since), SCHEMAS, with_text)
    connection.execute(f"set allowed_paths = {_text_list(files)}")
    connection.execute("set enable_external_access = false")
    connection.execute("set lock_configuration = true")
    return connection


def query(config: TideConfig, sql: str, *, with_text: bool = False) -> Answer:
    """Column names and rows of one statement that only reads; `with_text` adds the columns of `signals` that are prompt text.

    Raises InvalidRequest for SQL that is wrong or does anything but read.
    """
    _check_reads_only(sql)
    try:
        return _without_damage(config, Part(), sql, lambda: _ask(connect(config, with_text=with_text), sql))
    except duckdb.Error as error:
        raise InvalidRequest(f"{error}\nviews: {', '.join(VIEWS)}; `describe <view>` lists its columns") from error


def read(config: TideConfig, sql: str, parameters: Mapping[str, Any], *, since: float | None = None, until: float | None = None,
         version: str | None = None, tables: Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
    """Rows of a query of our own, in a database that this process keeps open; `since` as in `connect`.

    `until`: shards of hours that began before it. `version`: shards that can hold rows of this draft version. `tables`: Arrow tables that
    the query names beside the views. Row groups are skipped by the query's own conditions: compare `time`, not `epoch(time)`.

    Raises LakeError when the lake can't be read, LakeAway when its storage does not answer.
    """
    part = Part(since, until, version)
    try:
        return _without_damage(config, part, sql, lambda: _ask(_views_cursor(config, part, sql, tables or {}), sql, parameters))[1]
    except duckdb.Error as error:
        kind = LakeAway if is_away(error) else LakeError
        raise kind(f"can't query the lake under {config.state.lake}: {error}") from error


def _without_damage(config: TideConfig, part: Part, sql: str, ask: Callable[[], Answer]) -> Answer:
    """Ask; when that fails, find the shards that are damaged (or went away meanwhile) and ask once more, without them."""
    try:
        return ask()
    except _WRONG_SQL:
        raise
    except duckdb.Error:
        for name in _datasets(sql):        # signals are read through only if they were asked for
            find_damage(config.state.lake / name, config.target, part)
    return ask()


@functools.cache
def _database() -> Any:
    """Opening a database takes longer than most of our queries."""
    return duckdb.connect(":memory:", config={"threads": 1, "temp_directory": ""})


def _views_cursor(config: TideConfig, part: Part, sql: str, tables: Mapping[str, Any]) -> Any:
    cursor = _database().cursor()          # a connection of its own: temporary views are not shared
    _create_views(cursor, config, part, _datasets(sql))
    for name, table in tables.items():
        cursor.register(name, table)
    return cursor


def _ask(connection: Any, sql: str, parameters: Mapping[str, Any] | None = None) -> Answer:
    with connection:
        answer = connection.execute(sql, dict(parameters)) if parameters else connection.execute(sql)
        return [column[0] for column in answer.description], answer.fetchall()


def _datasets(sql: str) -> list[str]:
    """Which datasets a query can need: every view but `signals` and `skipped` is made of `acceptance`."""
    return ["acceptance", *(["signals"] if "signals" in sql.lower() or "skipped" in sql.lower() else [])]


def _create_views(connection: Any, config: TideConfig, part: Part, datasets: Iterable[str], with_text: bool = False) -> list[str]:
    """Create VIEWS, of these datasets; the files they read."""
    connection.execute("set TimeZone = 'UTC'")
    connection.execute("set enable_progress_bar = false")      # it goes to stdout, into the answer
    skipped, used = [], []
    for name in datasets:
        files, left_out = readable_shards(config.state.lake / name, config.target, SCHEMAS[name], part)
        hidden = _not_deleted(config) if name == "signals" else ""
        connection.execute(_dataset_view(connection, name, files, with_text) + hidden)
        skipped += left_out
        used += [shard.uri for shard in files if shard.store.is_local]
    connection.execute(_REQUESTS)
    connection.execute(_DRAFTS)
    connection.execute("create temp table skipped (path varchar, reason varchar)")
    if skipped:
        connection.executemany("insert into skipped values (?, ?)", [[shard.uri, why] for shard, why in skipped])
        _log.warning("left out %d shards of the lake (`tide sql \"from skipped\"`), the first: %s: %s", len(skipped), *skipped[0])
    return used


def _dataset_view(connection: Any, name: str, files: list[Stored], with_text: bool) -> str:
    """The statement that creates the view of one dataset."""
    schema = SCHEMAS[name]
    columns = [column for column in schema.names if with_text or column not in TEXT_COLUMNS]
    wanted = ", ".join(f'"{column}"' for column in (*columns, *PARTITIONS))
    if files and (not files[0].store.is_local or (name == "signals" and encryption.is_on())):
        connection.register(f"scanned_{name}", through_pyarrow(files, schema))
        source = f"scanned_{name}"
    elif files:
        kinds = ", ".join(f"'{column}': {kind}" for column, kind in PARTITIONS.items())
        source = f"read_parquet({_text_list([shard.uri for shard in files])}, hive_partitioning = true, hive_types = {{{kinds}}})"
    else:
        connection.register(f"no_{name}", schema.empty_table())
        source = f"(select *, {', '.join(f'null::{kind} as {column}' for column, kind in PARTITIONS.items())} from no_{name})"  # noqa: S608
    return f"create temp view {name} as select {wanted} from {source}"  # noqa: S608 - names of ours, paths quoted


def _not_deleted(config: TideConfig) -> str:
    """What hides rows of `signals` that were deleted and are still on disk."""
    tombstones = read_tombstones(config.state.signals)
    tenants = "".join(f" and not (sha256(tenant) = '{tenant}' and epoch(closed_at) <= {until!r})"
                      for tenant, until in tombstones.tenants.items())
    requests = f" and not list_contains({_text_list(sorted(tombstones.requests))}, sha256(request_id))" if tombstones.requests else ""
    return f" where true{requests}{tenants}" if tombstones else ""


def _text_list(values: list[str]) -> str:
    return "[" + ", ".join("'" + value.replace("'", "''") + "'" for value in values) + "]::varchar[]"


def _check_reads_only(sql: str) -> None:
    try:
        kinds = [statement.type for statement in duckdb.extract_statements(sql)]
    except duckdb.Error as error:
        raise InvalidRequest(str(error)) from error
    if len(kinds) != 1 or kinds[0] not in (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN):
        found = ", ".join(kind.name for kind in kinds) or "nothing"
        raise InvalidRequest(f"expected one statement that reads (select, from, describe, summarize, explain), got {found}")
