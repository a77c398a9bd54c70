"""Which shards SQL may be asked over, and what is wrong with the others. Knows Parquet files; knows no SQL.

Footers are checked once per shard. Pages are read through only after a query has failed, and what is found is remembered.
"""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tide_pipeline.capture.layout import scan

ShardKey = tuple[str, int, int]            # path, mtime in ns, size: shards never change, so this names their bytes

_damaged: dict[ShardKey, str] = {}         # the footer is right and the pages are not


def readable_shards(root: Path, target: str, schema: Any, since: float | None) -> tuple[list[str], list[tuple[Path, str]]]:
    """Live shards that have the schema's columns, oldest first, and what was left out with its reason."""
    shards, left_out = scan(root, target, since)
    files = []
    for path in shards:
        try:
            key = _key(path)
            why = _damaged.get(key) or _unlike(key, schema)
        except FileNotFoundError:          # compacted or deleted since it was listed
            continue
        if why:
            left_out.append((path, why))
        else:
            files.append(str(path))
    return files, left_out


def find_damage(root: Path, target: str, since: float | None) -> None:
    """Read every shard through, pages and checksums; what is found, `readable_shards` leaves out from now on."""
    for path in scan(root, target, since)[0]:
        with contextlib.suppress(FileNotFoundError):
            key = _key(path)
            if key not in _damaged and (why := _damage(path)):
                _damaged[key] = why


def _key(path: Path) -> ShardKey:
    stat = path.stat()
    return str(path), stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=65_536)
def _unlike(key: ShardKey, schema: Any) -> str:
    """Which column keeps a shard from being read as `schema`; "" when none does."""
    try:
        found = pq.read_schema(key[0])
    except FileNotFoundError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        return f"unreadable: {error}"
    wrong = [field.name for field in schema if field.name not in found.names or not found.field(field.name).type.equals(field.type)]
    return f"column {wrong[0]!r} is missing or of another type" if wrong else ""


def _damage(path: Path) -> str:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                file.read_row_group(group, use_threads=False)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        return f"damaged: {error}"
    return ""
