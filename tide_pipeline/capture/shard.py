"""Write one shard of either dataset into a store. Knows Parquet and the footer; knows no queues and no rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow.parquet as pq

from tide_pipeline.capture.names import SUPERSEDES_KEY, TARGET_KEY
from tide_pipeline.capture.schema import parquet_options
from tide_pipeline.capture.store import Store


def write_shard(store: Store, key: str, target: str, schema: Any, tables: Iterable[Any], supersedes: str = "") -> int:
    """Write tables of `schema`, one row group each, as the shard `key`; its size in bytes.

    `supersedes` is the JSON list of the file names, in the same folder, that no longer count once this shard is in place.
    """
    metadata = {TARGET_KEY: target.encode(), **({SUPERSEDES_KEY: supersedes.encode()} if supersedes else {})}
    with_footer = schema.with_metadata(metadata)

    def fill(stream: Any) -> None:
        with pq.ParquetWriter(stream, with_footer, **parquet_options(schema)) as writer:
            for table in tables:
                writer.write_table(table.replace_schema_metadata(metadata))

    return store.put(key, fill)
