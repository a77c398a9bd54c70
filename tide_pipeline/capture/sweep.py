"""Carry out tombstones: take deleted rows out of the shards of a dataset. Knows columns and tombstones; leaves none.

    signals/      the rows go: token ids, states, ids, everything
    acceptance/   the counts stay, as statistics of drafts; `request_id` becomes a random name (one for all rows of a request in a
                  shard) and `tenant` becomes "deleted"
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tide_pipeline.capture.layout import Listing, survey, targets
from tide_pipeline.capture.lease import Lease
from tide_pipeline.capture.rewrite import read_groups, remove, replace
from tide_pipeline.capture.schema import ACCEPTANCE_SCHEMA, SIGNALS_SCHEMA
from tide_pipeline.capture.shard import Origin
from tide_pipeline.capture.store import Store, Stored
from tide_pipeline.capture.tombstones import Tombstones, note_swept, read_tombstones, swept_until

DELETED_TENANT = "deleted"
SETTLE_S = 2.0                     # between a new shard and the end of an old one: listings that had begun come to their end
LEFTOVER_S = 3600.0                # a `.tmp` file of this age belongs to nobody


@dataclass
class Swept:
    """What was done."""

    signal_rows: int = 0               # rows of signals/ removed: windows
    acceptance_rows: int = 0           # rows of acceptance/ made nameless
    removed_files: int = 0
    unreadable: list[tuple[Stored, str]] = field(default_factory=list)     # may hold rows that nobody can find
    unfinished: list[Stored] = field(default_factory=list)                 # being written, or left by a crash within the last hour


@dataclass(frozen=True)
class Found:
    """Deleted rows of a shard."""

    gone: list[Origin]
    stays: bool                        # whether there is anything to keep


@dataclass(frozen=True)
class Dataset:
    """How rows of a dataset are found and taken away."""

    name: str
    schema: Any
    time_column: str
    edit: Callable[[Any, NDArray[np.bool_]], tuple[Any, NDArray[np.bool_]]]    # table, deleted rows -> what stays, and of which rows


def _without(table: Any, gone: NDArray[np.bool_]) -> tuple[Any, NDArray[np.bool_]]:
    return table.filter(pa.array(~gone)), ~gone


def _nameless(table: Any, gone: NDArray[np.bool_]) -> tuple[Any, NDArray[np.bool_]]:
    names: dict[str, str] = {}
    ids, tenants = (table.column(name).to_pylist() for name in ("request_id", "tenant"))
    ids = [names.setdefault(name, f"deleted-{secrets.token_hex(8)}") if deleted else name for name, deleted in zip(ids, gone, strict=True)]
    tenants = [DELETED_TENANT if deleted else name for name, deleted in zip(tenants, gone, strict=True)]
    for name, values in (("request_id", ids), ("tenant", tenants)):
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))
    return table, np.ones(table.num_rows, bool)


SIGNALS = Dataset("signals", SIGNALS_SCHEMA, "closed_at", _without)
ACCEPTANCE = Dataset("acceptance", ACCEPTANCE_SCHEMA, "time", _nameless)
DATASETS = (SIGNALS, ACCEPTANCE)


def sweep(lease: Lease, store: Store, dataset: Dataset, done: Swept, settle_s: float = SETTLE_S) -> None:
    """Carry out every tombstone of a dataset, in every target; what was done is added to `done`."""
    tombstones, begun = read_tombstones(store.root), time.time()
    if tombstones:
        before = len(done.unreadable)
        take_out(lease, store, dataset, tombstones, done, settle_s, swept_until(store, tombstones))
        if len(done.unreadable) == before:
            note_swept(store, tombstones, begun)


def take_out(lease: Lease, store: Store, dataset: Dataset, tombstones: Tombstones, done: Swept, settle_s: float = SETTLE_S,
             since: float = float("-inf")) -> None:
    """The same for these tombstones, in shards that were put in place after `since` (Unix seconds)."""
    for target in targets(store.root) if tombstones else []:
        listing = survey(store.root, target)
        _sweep(lease, listing, dataset, target, tombstones, done, settle_s, since)


def find(shards: Iterable[Stored], dataset: Dataset, tombstones: Tombstones, unreadable: list[tuple[Stored, str]]) -> dict[Stored, Found]:
    """The covered rows of each shard that has any."""
    found = {}
    for shard in shards:
        try:
            rows = _find(shard, dataset, tombstones)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            unreadable.append((shard, f"unreadable: {error}"))
            continue
        if rows.gone:
            found[shard] = rows
    return found


def covered(table: Any, dataset: Dataset, tombstones: Tombstones) -> NDArray[np.bool_]:
    """Mask of the deleted rows of a table."""
    ids, tenants = (table.column(name).to_pylist() for name in ("request_id", "tenant"))
    times = table.column(dataset.time_column).cast(pa.int64()).to_numpy() / 1e6
    mask = [tombstones.cover(*row) for row in zip(ids, tenants, times.tolist(), strict=True)]
    return np.array(mask, bool)


def _sweep(lease: Lease, listing: Listing, dataset: Dataset, target: str, tombstones: Tombstones, done: Swept, settle_s: float,
           since: float) -> None:
    done.unreadable += listing.skipped
    live, superseded = (find((file for file in files if file.mtime_ns > since * 1e9), dataset, tombstones, done.unreadable)
                        for files in (listing.live, listing.superseded))
    old = [file for file in listing.leftovers if time.time() - file.mtime_ns / 1e9 >= LEFTOVER_S]
    done.unfinished += [file for file in listing.leftovers if file not in old]
    for shard, found in live.items():
        if found.stays:
            replace(lease, listing, [shard], target, dataset.schema,
                    lambda table: dataset.edit(table, covered(table, dataset, tombstones)))
    if dataset is SIGNALS:
        done.signal_rows += sum(len(found.gone) for found in live.values())
    else:
        done.acceptance_rows += sum(len(found.gone) for found in live.values())
    if live or superseded or old:
        time.sleep(settle_s)
        done.removed_files += remove(lease, listing, [*live, *superseded, *old])


def _find(shard: Stored, dataset: Dataset, tombstones: Tombstones) -> Found:
    gone: list[Origin] = []
    rows = 0
    for table, origins in read_groups(shard, ("request_id", "tenant", dataset.time_column)):
        rows += table.num_rows
        gone += [origin for origin, is_gone in zip(origins, covered(table, dataset, tombstones), strict=True) if is_gone]
    return Found(gone, len(gone) < rows or dataset is ACCEPTANCE)
