"""Put small shards together, so that a lake of any age is listed and read in few, large files. Knows sizes and hours; knows no rows.

Shards of one hour become one of about `target_bytes`; the old ones stay superseded for a while, for readers that have listed them.
Writers go on meanwhile and need not know: they only ever add names.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import pyarrow as pa

from tide_pipeline.capture.layout import Listing, superseded_by, survey, targets
from tide_pipeline.capture.lease import Lease, maintenance
from tide_pipeline.capture.names import hour_end, is_compact
from tide_pipeline.capture.rewrite import read_groups, remove, replace
from tide_pipeline.capture.store import Root, Stored, is_away, open_store
from tide_pipeline.capture.sweep import DATASETS, LEFTOVER_S, SETTLE_S, Dataset, Swept, sweep

TARGET_BYTES = 48 * 2**20          # of a compacted shard: it must fit an object of a bucket
GRACE_S = 3600.0                   # superseded shards stay that long
CLOSED_S = 300.0                   # after its end nothing is added to an hour, but by a writer whose disk refused
MIN_SHARDS = 8                     # worth a rewrite while an hour goes on; two when it is over


@dataclass
class Compaction(Swept):
    """What was done, over both datasets."""

    compacted_shards: int = 0          # that are superseded now
    new_shards: int = 0
    damaged: list[tuple[Stored, str]] = field(default_factory=list)        # left as they are


def compact(lake: Root, *, target_bytes: int = TARGET_BYTES, grace_s: float = GRACE_S, settle_s: float = SETTLE_S) -> Compaction:
    """Compact every target of both datasets, carry out tombstones, and remove what has been superseded for `grace_s`.

    Raises:
        LakeError: the lake can't be listed, or somebody else keeps rewriting it.
        OSError: disk or bucket refuse: nothing is half-done, call again.
    """
    done = Compaction()
    for dataset in DATASETS:
        store = open_store(f"{os.fspath(lake)}/{dataset.name}")
        with maintenance(store) as lease:
            sweep(lease, store, dataset, done, settle_s)
            for target in targets(store.root):
                _compact(lease, survey(store.root, target), dataset, target, target_bytes, done)
                done.removed_files += clean(lease, survey(store.root, target), grace_s)
    return done


def clean(lease: Lease, listing: Listing, grace_s: float) -> int:
    """Remove shards that have been superseded for `grace_s`, and what writers left that died an hour ago; how many files."""
    until_ns = (time.time() - grace_s) * 1e9
    old = {(shard.folder, name) for shard in (*listing.live, *listing.superseded) if is_compact(shard.name) and shard.mtime_ns <= until_ns
           for name in superseded_by(shard)}
    leftovers = [file for file in listing.leftovers if file.mtime_ns <= (time.time() - LEFTOVER_S) * 1e9]
    return remove(lease, listing, [*(file for file in listing.superseded if (file.folder, file.name) in old), *leftovers])


def _compact(lease: Lease, listing: Listing, dataset: Dataset, target: str, target_bytes: int, done: Compaction) -> None:
    for group in _groups(listing.live, target_bytes):
        sound = group
        try:
            replace(lease, listing, sound, target, dataset.schema)
        except (OSError, ValueError, KeyError, pa.ArrowException):
            damaged = [(shard, why) for shard in group if (why := _damage(shard))]
            if not damaged:                # it was not the shards: the disk is full, the bucket is away
                raise
            done.damaged += damaged
            sound = [shard for shard in group if shard not in {file for file, _ in damaged}]
            if len(sound) < 2:
                continue
            replace(lease, listing, sound, target, dataset.schema)
        done.compacted_shards += len(sound)
        done.new_shards += 1


def _groups(shards: Iterable[Stored], target_bytes: int) -> Iterator[list[Stored]]:
    """Small shards of one hour, oldest first, as many as fit one shard."""
    hours: dict[str, list[Stored]] = {}
    for shard in shards:
        if shard.size <= target_bytes // 2:
            hours.setdefault(shard.folder, []).append(shard)
    for folder, small in hours.items():
        needed = 2 if hour_end(folder) + CLOSED_S < time.time() else MIN_SHARDS
        group: list[Stored] = []
        for shard in small:
            if group and sum(other.size for other in group) + shard.size > target_bytes:
                if len(group) >= needed:
                    yield group
                group = []
            group.append(shard)
        if len(group) >= needed:
            yield group


def _damage(shard: Stored) -> str:
    try:
        for _ in read_groups(shard):
            pass
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        if is_away(error):
            raise
        return str(error)
    return ""
