"""Which shards SQL may be asked over, and what is wrong with the others. Knows Parquet files; knows no SQL.

Footers are checked once per shard. Pages are read through only after a query has failed, and what is found is remembered.
"""

from __future__ import annotations

import functools
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from tide_pipeline.capture.encryption import for_reading, parquet_file
from tide_pipeline.capture.layout import Vanished, scan, settled
from tide_pipeline.capture.store import Root, Stored

_damaged: dict[Stored, str] = {}           # the footer is right and the pages are not


Period = tuple[float | None, float | None]     # as `since` and `until` of live_shards: whole shards, hours at the end


def readable_shards(root: Root, target: str, schema: Any, period: Period) -> tuple[list[Stored], list[tuple[Stored, str]]]:
    """Live shards that have the schema's columns, oldest first, and what was left out with its reason."""
    return settled(lambda: _readable(root, target, schema, period))


def _readable(root: Root, target: str, schema: Any, period: Period) -> tuple[list[Stored], list[tuple[Stored, str]]]:
    shards, left_out = scan(root, target, *period)
    files = []
    for shard in shards:
        try:
            why = _damaged.get(shard) or _unlike(shard, schema)
        except FileNotFoundError as error:
            raise Vanished(f"{shard} was replaced while the lake was listed: ask again") from error
        if why:
            left_out.append((shard, why))
        else:
            files.append(shard)
    return files, left_out


def through_pyarrow(shards: list[Stored], schema: Any) -> Any:
    """Shards as a dataset that DuckDB scans: for a bucket its own reader is an extension to download, and it has no key of ours."""
    options = ds.ParquetFragmentScanOptions(**for_reading())
    partitions = ds.partitioning(pa.schema([("target", pa.string()), ("date", pa.date32()), ("hour", pa.int32())]), flavor="hive")
    store = shards[0].store
    return ds.dataset([f"{store.base}/{shard.key}" for shard in shards], filesystem=store.fs,
                      format=ds.ParquetFileFormat(default_fragment_scan_options=options), partitioning=partitions,
                      partition_base_dir=store.base, schema=pa.schema([*schema, *partitions.schema]))


def find_damage(root: Root, target: str, period: Period) -> None:
    """Read every shard through, pages and checksums; what is found, `readable_shards` leaves out from now on."""
    for shard in scan(root, target, *period)[0]:
        if shard not in _damaged and (why := _damage(shard)):
            _damaged[shard] = why


@functools.lru_cache(maxsize=65_536)
def _unlike(shard: Stored, schema: Any) -> str:
    """Which column keeps a shard from being read as `schema`; "" when none does."""
    try:
        with shard.open() as stream:
            found = pq.read_schema(stream, **for_reading())
    except FileNotFoundError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        return f"unreadable: {error}"
    wrong = [field.name for field in schema if field.name not in found.names or not found.field(field.name).type.equals(field.type)]
    return f"column {wrong[0]!r} is missing or of another type" if wrong else ""


def _damage(shard: Stored) -> str:
    try:
        with shard.open() as stream, parquet_file(stream, page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                file.read_row_group(group, use_threads=False)
    except FileNotFoundError:              # replaced since it was listed: the next listing tells
        return ""
    except (OSError, ValueError, pa.ArrowException) as error:
        return f"damaged: {error}"
    return ""
