"""Write one shard of either dataset into a store. Knows Parquet and the footer; knows no queues.

A shard made of others tells in its footer what it supersedes, and where its rows stood before (`tide.origins`): drafts remember the
windows that they were trained on by shard and row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import pyarrow.parquet as pq

from tide_pipeline.capture.checksums import Span
from tide_pipeline.capture.encryption import for_writing
from tide_pipeline.capture.names import ORIGINS_KEY, SUPERSEDES_KEY, TARGET_KEY, is_compact
from tide_pipeline.capture.schema import SIGNALS_SCHEMA, STATE_COLUMNS, parquet_options
from tide_pipeline.capture.sink import Sink
from tide_pipeline.capture.store import Store, Stored

Address = tuple[str, int]                  # file name and row
Origin = tuple[Address, ...]               # all addresses that a row ever had: the engine's writer's first, the present one last


def write_shard(store: Store, key: str, target: str, schema: Any, tables: Iterable[Any]) -> Stored:
    """Write tables of `schema`, one row group each, as the shard `key`."""
    return _write(store, key, target, schema, ((table, None) for table in tables), {})


def write_successor(store: Store, key: str, target: str, schema: Any, parts: Iterable[tuple[Any, Sequence[Origin]]],
                    supersedes: Iterable[str]) -> Stored:
    """Write a shard that stands for others: tables with the origin of each row, and the names, in its folder, that no longer count."""
    return _write(store, key, target, schema, parts, {SUPERSEDES_KEY: json.dumps(sorted(supersedes)).encode()})


def origins_of(file: Stored, metadata: Any) -> list[Origin]:
    """Of each row of a shard with this Parquet metadata; its address in this shard is the last."""
    origins: list[list[Address]] = [[] for _ in range(metadata.num_rows)]
    for name, there, count, here in json.loads((metadata.metadata or {}).get(ORIGINS_KEY, b"[]")):
        for i in range(count):
            origins[here + i].append((name, there + i))
    return [(*sorted(addresses, key=lambda address: is_compact(address[0])), (file.name, row)) for row, addresses in enumerate(origins)]


def _write(store: Store, key: str, target: str, schema: Any, parts: Iterable[tuple[Any, Sequence[Origin] | None]],
           more: dict[bytes, bytes]) -> Stored:
    metadata = {TARGET_KEY: target.encode(), **more}
    with_footer = schema.with_metadata(metadata)

    options = parquet_options(schema) | (for_writing() if schema.equals(SIGNALS_SCHEMA) else {})

    def fill(sink: Sink) -> None:
        origins: list[Sequence[Origin] | None] = []
        written: list[Any] = []
        with pq.ParquetWriter(sink.stream, with_footer, metadata_collector=written, **options) as writer:
            for table, rows in parts:
                writer.write_table(table.replace_schema_metadata(metadata))
                sink.part_done()
                origins.append(rows)
            if more:
                writer.add_key_value_metadata({ORIGINS_KEY.decode(): json.dumps(_runs(chain(*(rows or () for rows in origins))))})

        if "encryption_properties" not in options:         # it encrypts page headers too
            sink.pages += _plain_pages(written[0])

    return store.put(key, fill)


def _plain_pages(metadata: Any) -> Iterator[Span]:
    """Where the bulk of a shard lies: columns of plain pages, which carry their CRC."""
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema in STATE_COLUMNS:
                yield column.data_page_offset, column.total_compressed_size


def _runs(origins: Iterable[Origin]) -> list[list[Any]]:
    """[name, row there, number of rows, row here] of rows that follow each other in both."""
    runs: list[list[Any]] = []
    open_runs: dict[str, list[Any]] = {}
    for here, addresses in enumerate(origins):
        for name, there in addresses:
            run = open_runs.get(name)
            if run is not None and (run[1] + run[2], run[3] + run[2]) == (there, here):
                run[2] += 1
            else:
                open_runs[name] = [name, there, 1, here]
                runs.append(open_runs[name])
    return runs
