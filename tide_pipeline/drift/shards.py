"""Which shards SQL may be asked over, and what is wrong with the others. Knows Parquet files; knows no SQL.

Footers are read once per shard: do its columns fit, and which draft versions can be in it? Pages are read through only after a query has
failed, and what is found is remembered.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from tide_pipeline.capture.encryption import for_reading, parquet_file
from tide_pipeline.capture.layout import Vanished, scan, settled
from tide_pipeline.capture.store import Root, Stored, away, is_away

_ANY_VERSION = "", chr(sys.maxunicode)
_damaged: dict[Stored, str] = {}           # the footer is right and the pages are not


class Part(NamedTuple):
    """Of a dataset: whole shards, those that can hold what is asked for."""

    since: float | None = None             # as of live_shards
    until: float | None = None
    version: str | None = None             # of the draft


def readable_shards(root: Root, target: str, schema: Any, part: Part) -> tuple[list[Stored], list[tuple[Stored, str]]]:
    """Live shards that have the schema's columns, oldest first, and what was left out with its reason. Raises LakeAway."""
    return settled(lambda: _readable(root, target, schema, part))


def _readable(root: Root, target: str, schema: Any, part: Part) -> tuple[list[Stored], list[tuple[Stored, str]]]:
    shards, left_out = scan(root, target, part.since, part.until)
    files = []
    for shard in shards:
        try:
            unlike, first, last = _footer(shard, schema)
            why = _damaged.get(shard) or unlike
        except FileNotFoundError as error:
            raise Vanished(f"{shard} was replaced while the lake was listed: ask again") from error
        if why:
            left_out.append((shard, why))
        elif part.version is None or first <= part.version <= last:
            files.append(shard)
    return files, left_out


def through_pyarrow(shards: list[Stored], schema: Any) -> Any:
    """Shards as a dataset that DuckDB scans: for a bucket its own reader is an extension to download, and it has no key of ours."""
    import pyarrow.dataset as ds  # imports pandas, if it is there

    options = ds.ParquetFragmentScanOptions(**for_reading())
    partitions = ds.partitioning(pa.schema([("target", pa.string()), ("date", pa.date32()), ("hour", pa.int32())]), flavor="hive")
    store = shards[0].store
    return ds.dataset([f"{store.base}/{shard.key}" for shard in shards], filesystem=store.fs,
                      format=ds.ParquetFileFormat(default_fragment_scan_options=options), partitioning=partitions,
                      partition_base_dir=store.base, schema=pa.schema([*schema, *partitions.schema]))


def find_damage(root: Root, target: str, part: Part) -> None:
    """Read every shard through, pages and checksums; what is found, `readable_shards` leaves out from now on. Raises LakeAway."""
    for shard in scan(root, target, part.since, part.until)[0]:
        if shard not in _damaged and (why := _damage(shard)):
            _damaged[shard] = why


@functools.lru_cache(maxsize=65_536)
def _footer(shard: Stored, schema: Any) -> tuple[str, str, str]:
    """Which column keeps a shard from being read as `schema` ("" when none does), and its first and last draft version by name."""
    try:
        with shard.open() as stream:
            metadata = pq.read_metadata(stream, **for_reading())
            found = metadata.schema.to_arrow_schema()
    except FileNotFoundError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        if is_away(error):                 # raised, and so not remembered
            raise away(shard, error) from error
        return f"unreadable: {error}", *_ANY_VERSION
    wrong = [field.name for field in schema if field.name not in found.names or not found.field(field.name).type.equals(field.type)]
    if wrong:
        return f"column {wrong[0]!r} is missing or of another type", *_ANY_VERSION
    return "", *_versions(metadata)


def _versions(metadata: Any) -> tuple[str, str]:
    """From the statistics of the row groups; writers may shorten them, but only to bounds."""
    column = [metadata.schema.column(i).path for i in range(metadata.num_columns)].index("draft_version")
    groups = [metadata.row_group(i).column(column).statistics for i in range(metadata.num_row_groups)]
    if not groups or not all(group is not None and group.has_min_max for group in groups):
        return _ANY_VERSION
    return sys.intern(min(group.min for group in groups)), sys.intern(max(group.max for group in groups))


def _damage(shard: Stored) -> str:
    try:
        with shard.open() as stream, parquet_file(stream, page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                file.read_row_group(group, use_threads=False)
    except FileNotFoundError:              # replaced since it was listed: the next listing tells
        return ""
    except (OSError, ValueError, pa.ArrowException) as error:
        if is_away(error):
            raise away(shard, error) from error
        return f"damaged: {error}"
    return ""
