"""Which shards of a lake count. Knows names and footers; knows no columns. Trainer, drift and SQL all ask here.

A shard made of others (compaction, deletion) names in its footer what it supersedes, all of it in its own folder; only footers of
`.compact.parquet` files are read to list a lake. What two makers superseded at once counts once: see `_superseded`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections import Counter
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
from tide_pipeline.capture.sink import is_leftover
from tide_pipeline.capture.store import Root, Store, Stored, is_away, open_store, unlisted
from tide_pipeline.errors import LakeError

__all__ = ["SUPERSEDES_KEY", "TARGET_KEY", "Listing", "Vanished", "live_shards", "scan", "settled", "survey", "targets", "written_at"]

T = TypeVar("T")

REPEATS = "repeats rows of"        # begins the reason of a shard that is whole, and left out as its rows are in another one

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


def live_shards(root: Root, target: str, since: float | None = None, until: float | None = None) -> list[Stored]:
    """Complete shards of `root` (a dataset's folder or s3:// URI) that count, oldest first; [] where there are none.

    With `since` (Unix seconds), those that can hold rows closed at or after it; with `until`, those of hours that began before it.
    Raises LakeError when the lake can't be listed; LakeAway, which is one, when waiting may help.
    """
    return survey(root, target, since, until).live


def scan(root: Root, target: str, since: float | None = None,
         until: float | None = None) -> tuple[list[Stored], list[tuple[Stored, str]]]:
    """`live_shards`, and beside them the files that don't count, each with its reason."""
    found = survey(root, target, since, until)
    return found.live, found.skipped


def survey(root: Root, target: str, since: float | None = None, until: float | None = None) -> Listing:
    """Every file of `target`, sorted by what it is worth; with `until` (Unix seconds), of hours that began before it."""
    with _listing(root):
        store = open_store(root)
        return settled(lambda: _survey(store, _parts(store, target, since, until), since))


def newest_first(root: Root, target: str, since: float | None = None, until: float | None = None) -> Iterator[Listing]:
    """`survey` a day at a time, for who may not need all days: rows never move from one hour's folder to another. May raise Vanished."""
    with _listing(root):
        store = open_store(root)
        days = sorted(store.folders(target_folder(target)), key=lambda day: _span(day)[1], reverse=True)
    for day in days:
        with _listing(root):
            found = _survey(store, _parts_of_day(store, day, since, until), since)
        yield found


@contextlib.contextmanager
def _listing(root: Root) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise unlisted(root, error) from error


def first_day(root: Root, target: str) -> float | None:
    """Unix seconds at which the oldest day of `target` began; None for an empty lake."""
    with _listing(root):
        begins = [_span(day)[0] for day in open_store(root).folders(target_folder(target))]
    return min((begin for begin in begins if begin != float("-inf")), default=None)


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
    with _listing(root):
        return sorted(target_of(key) for key in open_store(root).folders() if key.startswith("target="))


def superseded_by(shard: Stored) -> frozenset[str]:
    """Names in the footer of a shard: what it stands for."""
    return frozenset(json.loads(_names(shard)))


def _survey(store: Store, parts: Sequence[str], since: float | None) -> Listing:
    found, good = Listing(), []
    files = _snapshot(store, parts, since)
    crowded = {folder for folder, count in Counter(file.folder for file in files).items() if count > 1}
    for file in files:
        if is_leftover(file.name):
            found.leftovers.append(file)
        elif file.name.endswith(".parquet") and not file.name.startswith("."):
            try:
                reason = _incomplete(file)
                if not reason and is_compact(file.name) and file.folder in crowded:
                    superseded_by(file)            # here, where a footer that can't be read has its reason written down
            except FileNotFoundError as error:
                raise Vanished(f"{file} was replaced while the lake was listed, again and again: wait for the maintenance") from error
            except (OSError, ValueError, pa.ArrowException) as error:
                if is_away(error):
                    raise
                reason = f"unreadable: {error}"
            if reason:
                found.skipped.append((file, reason))
            else:
                good.append(file)
    gone, doubles = _superseded([file for file in good if is_compact(file.name) and file.folder in crowded])
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
            doubles[shard] = f"{REPEATS} {sorted(rival.name for rival in rivals)[0]}: made of the same shards at the same time"
    return set(gone), doubles


def _snapshot(store: Store, parts: Sequence[str], since: float | None) -> list[Stored]:
    """A listing that misses no row: no storage lists a folder in one instant.

    A listing can miss a new shard that came too late and the old ones that went too early. What was in place before an old one went is
    in the next listing: a listing is good when the next one shows no shard made of others that it had not.
    """
    for _ in range(_TRIES):
        files = [file for part in parts for file in store.files(part, recursive=True)]
        known = {file.key for file in files if is_compact(file.name)}
        if {key for part in parts for key in store.keys(part, recursive=True) if is_compact(key)} <= known:
            return [file for file in files if file.key.count("/") == 3 and (since is None or written_at(file) >= since)]
    raise Vanished(f"shards under {store.root} are replaced faster than they can be listed: wait for the maintenance")


def _parts(store: Store, target: str, since: float | None, until: float | None) -> list[str]:
    """Folders whose files, at any depth, can hold rows closed at or after `since`, of hours that began before `until`."""
    folder = target_folder(target)
    if since is None and until is None:
        return [folder]
    return [part for day in store.folders(folder) for part in _parts_of_day(store, day, since, until)]


def _parts_of_day(store: Store, day: str, since: float | None, until: float | None) -> list[str]:
    """The day, its hours in the period where it is not the whole of it, or nothing."""
    def is_in(folder: str) -> bool:
        begin, end = _span(folder)
        return (since is None or end > since) and (until is None or begin < until)

    begin, end = _span(day)
    if not is_in(day):
        return []
    if (since is None or begin >= since) and (until is None or end <= until):
        return [day]
    return [hour for hour in store.folders(day) if is_in(hour)]


@functools.lru_cache(maxsize=4096)
def _span(folder: str) -> tuple[float, float]:
    """Unix seconds of begin and end of a day's or hour's folder; without bounds for another name."""
    end = hour_end(folder)
    return (end - (3600 if "/hour=" in folder else 86_400), end) if end != float("inf") else (float("-inf"), end)


@functools.lru_cache(maxsize=65_536)
def _incomplete(file: Stored) -> str:
    """Why a file is no complete Parquet; "" when it is one. Errors are not remembered."""
    with file.open() as stream:
        if file.size < 12 or stream.read_at(4, 0) != _MAGIC or stream.read_at(4, file.size - 4) != _MAGIC:
            return f"not a complete Parquet file ({file.size} bytes): truncated, or of another kind"
    return ""


@functools.lru_cache(maxsize=256)          # of up to 100 KB
def _names(file: Stored) -> bytes:
    """JSON list of what a shard supersedes, from its footer: slow to read, and needed only where other files lie beside it."""
    with file.open() as stream:
        return bytes((pq.read_metadata(stream).metadata or {}).get(SUPERSEDES_KEY, b"[]"))
