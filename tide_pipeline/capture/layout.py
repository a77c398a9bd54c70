"""Which shards of a lake count. Knows names and footers; knows no columns. Trainer, drift and SQL all ask here.

A shard made of others (compaction, deletion) names in its footer what it supersedes, all of it in its own folder; only footers of
`.compact.parquet` files are read to list a lake. What two makers superseded at once counts once: see `_superseded`.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from tide_pipeline.capture.names import (
    SUPERSEDES_KEY,
    TARGET_KEY,
    hour_end,
    is_compact,
    target_folder,
    target_of,
    written_at,
)
from tide_pipeline.capture.store import Root, Store, Stored, is_leftover, open_store
from tide_pipeline.errors import LakeError

__all__ = ["SUPERSEDES_KEY", "TARGET_KEY", "Listing", "Vanished", "live_shards", "scan", "settled", "survey", "targets", "written_at"]

T = TypeVar("T")

_MAGIC = b"PAR1"
_TRIES = 10                        # listings, while others replace shards under our eyes
_PAUSE_S = 0.05                    # before the second; grows


class Vanished(LakeError):
    """A shard went after it was listed: what replaced it is in the next listing."""


@dataclass
class Listing:
    """The files of one target, oldest first."""

    live: list[Stored] = field(default_factory=list)
    skipped: list[tuple[Stored, str]] = field(default_factory=list)        # not readable, or not counted, and why
    superseded: list[Stored] = field(default_factory=list)                 # their rows are in a live shard
    leftovers: list[Stored] = field(default_factory=list)                  # `.tmp` of a write that is going on, or was cut short


def live_shards(root: Root, target: str, since: float | None = None) -> list[Stored]:
    """Complete shards of `root` (a dataset's folder or s3:// URI) that count, oldest first; [] where there are none.

    With `since` (Unix seconds), those that can hold rows closed at or after it. Raises LakeError when the lake can't be listed.
    """
    return survey(root, target, since).live


def scan(root: Root, target: str, since: float | None = None) -> tuple[list[Stored], list[tuple[Stored, str]]]:
    """`live_shards`, and beside them the files that don't count, each with its reason."""
    found = survey(root, target, since)
    return found.live, found.skipped


def survey(root: Root, target: str, since: float | None = None) -> Listing:
    """Every file of `target`, sorted by what it is worth."""
    try:
        return settled(lambda: _survey(open_store(root), target, since))
    except OSError as error:
        raise LakeError(f"can't list {root}: {error}; check that it is there and readable by this user") from error


def settled(read: Callable[[], T]) -> T:
    """`read()`, begun again from the listing when a shard vanishes under it."""
    for attempt in range(1, _TRIES):
        try:
            return read()
        except Vanished:
            time.sleep(attempt * _PAUSE_S)
    return read()


def targets(root: Root) -> list[str]:
    """Targets that have a folder in this dataset."""
    return sorted(target_of(key) for key in open_store(root).folders() if key.startswith("target="))


def superseded_by(shard: Stored) -> frozenset[str]:
    """Names in the footer of a shard: what it stands for."""
    return _footer(shard)[1]


def _survey(store: Store, target: str, since: float | None) -> Listing:
    found, good = Listing(), []
    for file in _snapshot(store, target, since):
        if is_leftover(file.name):
            found.leftovers.append(file)
        elif file.name.endswith(".parquet") and not file.name.startswith("."):
            try:
                reason = _footer(file)[0]
            except FileNotFoundError as error:
                raise Vanished(f"{file} was replaced while the lake was listed, again and again: wait for the maintenance") from error
            except (OSError, ValueError, pa.ArrowException) as error:
                reason = f"unreadable: {error}"
            if reason:
                found.skipped.append((file, reason))
            else:
                good.append(file)
    gone, doubles = _superseded([file for file in good if is_compact(file.name)])
    found.skipped += doubles.items()
    for file in sorted(good, key=lambda file: (written_at(file), file.name)):
        if file not in doubles:
            (found.superseded if (file.folder, file.name) in gone else found.live).append(file)
    return found


def _superseded(made: Sequence[Stored]) -> tuple[set[tuple[str, str]], dict[Stored, str]]:
    """(folder, name) of what no longer counts, and shards that repeat what another one made of the same shards, with the reason.

    Claims keep two makers apart (lease.py). Should one fail, the first by name wins, for every reader: a shard that stands for
    something that an earlier one stands for, without standing for that one too, does not count.
    """
    gone: dict[tuple[str, str], Stored] = {}
    doubles: dict[Stored, str] = {}
    for shard in sorted(made, key=lambda shard: (len(superseded_by(shard) & {other.name for other in made}), shard.name)):
        names = superseded_by(shard)
        rivals = {gone[key] for name in names if (key := (shard.folder, name)) in gone}
        if all(rival.name in names for rival in rivals):
            gone |= {(shard.folder, name): shard for name in names}
        else:
            doubles[shard] = f"repeats rows of {sorted(rival.name for rival in rivals)[0]}: made of the same shards at the same time"
    return set(gone), doubles


def _snapshot(store: Store, target: str, since: float | None) -> list[Stored]:
    """A listing that misses no row: no storage lists a folder in one instant.

    A listing can miss a new shard that came too late and the old ones that went too early. What was in place before an old one went is
    in the next listing: a listing is good when the next one shows no shard made of others that it had not.
    """
    files = list(_files(store, target, since))
    for _ in range(_TRIES):
        later = list(_files(store, target, since))
        if {file for file in later if is_compact(file.name)} <= set(files):
            return files
        files = later
    raise Vanished(f"shards under {store.root} are replaced faster than they can be listed: wait for the maintenance")


def _files(store: Store, target: str, since: float | None) -> Iterator[Stored]:
    """Files that can hold rows closed at or after `since`; days and hours before it are not opened."""
    folder = target_folder(target)
    for day in store.folders(folder) if since is not None else [folder]:
        if since is not None and hour_end(day) <= since:
            continue
        for file in store.files(day, recursive=True):
            if file.key.count("/") == 3 and (since is None or (hour_end(file.folder) > since and written_at(file) >= since)):
                yield file


@functools.lru_cache(maxsize=65_536)
def _footer(file: Stored) -> tuple[str, frozenset[str]]:
    """Why a file is no complete Parquet ("" when it is one), and what it supersedes. Errors are not remembered."""
    with file.open() as stream:
        if file.size < 12 or stream.read_at(4, 0) != _MAGIC or stream.read_at(4, file.size - 4) != _MAGIC:
            return f"not a complete Parquet file ({file.size} bytes): truncated, or of another kind", frozenset()
        names = (pq.read_metadata(stream).metadata or {}).get(SUPERSEDES_KEY, b"[]") if is_compact(file.name) else b"[]"
    return "", frozenset(json.loads(names))
