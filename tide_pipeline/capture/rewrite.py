"""Replace shards by one that holds what is kept of them, and remove bytes that no longer count. Knows neither why nor when.

The order makes each step safe to die after: the new shard is in place before an old one goes, and a shard goes only after all that it
stands for, or those would count again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tide_pipeline.capture.encode import GROUP_BYTES
from tide_pipeline.capture.encryption import parquet_file
from tide_pipeline.capture.layout import Listing, superseded_by
from tide_pipeline.capture.lease import Lease
from tide_pipeline.capture.names import is_compact, successor, written_at
from tide_pipeline.capture.shard import Origin, origins_of, write_successor
from tide_pipeline.capture.store import Stored

Edit = Callable[[Any], tuple[Any, NDArray[np.bool_]]]      # table -> what is kept of it, and the mask of the rows that were


def unchanged(table: Any) -> tuple[Any, NDArray[np.bool_]]:
    return table, np.ones(table.num_rows, bool)


def replace(lease: Lease, listing: Listing, inputs: Sequence[Stored], target: str, schema: Any, edit: Edit = unchanged) -> Stored:
    """A shard of what `edit` keeps of `inputs` (live, of one folder, readable). They stay on disk, superseded."""
    folder = inputs[0].folder
    assert all(shard.folder == folder for shard in inputs)
    there = {file.name for file in listing.superseded if file.folder == folder}
    stands_for = {shard.name for shard in inputs} | {name for shard in inputs for name in superseded_by(shard) if name in there}
    key = successor(folder, max(written_at(shard) for shard in inputs))
    lease.check()
    return write_successor(inputs[0].store, key, target, schema, _grouped(_parts(inputs, schema, edit)), stands_for)


def remove(lease: Lease, listing: Listing, shards: Iterable[Stored]) -> int:
    """Remove shards, each after the files that it stands for; how many files went."""
    there = {(file.folder, file.name): file for file in (*listing.superseded, *listing.live)}
    order: dict[Stored, None] = {}
    for shard in shards:
        names = superseded_by(shard) if is_compact(shard.name) and (shard.folder, shard.name) in there else ()
        oldest_first = sorted(names, key=lambda name: (is_compact(name), name))
        order |= {there[key]: None for name in oldest_first if (key := (shard.folder, name)) in there}
        order[shard] = None
    for file in order:
        lease.check()
        file.store.remove(file.key)
    return len(order)


def read_groups(shard: Stored, columns: Sequence[str] | None = None) -> Iterator[tuple[Any, list[Origin]]]:
    """Row groups as tables, each row with its origin. Raises OSError or ArrowException for a damaged shard."""
    with shard.open() as stream, parquet_file(stream, page_checksum_verification=True) as file:
        origins, first = origins_of(shard, file.metadata), 0
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=None if columns is None else list(columns), use_threads=False)
            yield table, origins[first:first + table.num_rows]
            first += table.num_rows


def _parts(inputs: Sequence[Stored], schema: Any, edit: Edit) -> Iterator[tuple[Any, list[Origin]]]:
    for shard in inputs:
        for table, origins in read_groups(shard):
            kept, mask = edit(table.select(schema.names).cast(schema))
            yield kept, [origin for origin, keep in zip(origins, mask, strict=True) if keep]


def _grouped(parts: Iterable[tuple[Any, list[Origin]]]) -> Iterator[tuple[Any, list[Origin]]]:
    """Small tables put together into row groups of about GROUP_BYTES."""
    tables: list[Any] = []
    origins: list[Origin] = []
    size = 0
    for table, rows in parts:
        if tables and size + table.nbytes > GROUP_BYTES:
            yield pa.concat_tables(tables).combine_chunks(), origins
            tables, origins, size = [], [], 0
        tables.append(table)
        origins += rows
        size += table.nbytes
    if tables:
        yield pa.concat_tables(tables).combine_chunks(), origins
