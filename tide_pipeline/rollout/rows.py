"""Rows of the acceptance log, each once. Knows shards and what compaction does to them; keeps no row.

Shards never change, so what was added of one stays true. A shard made of others says nothing new where all of them were added; where only
some were, everything is added anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from tide_pipeline.capture.layout import REPEATS, superseded_by, survey
from tide_pipeline.capture.names import is_compact
from tide_pipeline.capture.store import Stored
from tide_pipeline.config import TideConfig
from tide_pipeline.errors import LakeError

COLUMNS = ("time", "request_id", "workload", "replica", "draft_version", "drafted", "accepted", "emitted_tokens", "duration_ms",
           "finish_reason", "mean_batch_size")

Place = tuple[str, str]                # folder and name of a shard


@dataclass(frozen=True, slots=True)
class LiveRow:
    """One closed block of steps; `drafted` and `accepted` count its first draft positions."""

    at: float
    request_id: str
    workload: str
    replica: str
    draft_version: str
    drafted: int
    accepted: int
    emitted: int = 0
    duration_ms: float = 0.0
    finish_reason: str = ""        # "" while the request goes on
    batch: float = 1.0             # requests in the same steps, on average


class Sums(Protocol):
    def add(self, row: LiveRow, /) -> None: ...


S = TypeVar("S", bound=Sums)


class LiveLog(Generic[S]):
    """Sums over the rows closed at or after `since` (Unix seconds). Losing it loses nothing: the next one reads the log again."""

    def __init__(self, config: TideConfig, since: float, begin: Callable[[], S]) -> None:
        self._config, self._since, self._begin = config, since, begin
        self._added: set[Place] = set()
        self._sums = begin()

    def sums(self) -> S:
        """With all that is in the log now. Raises LakeError while a part of it can't be listed or read; what was added stays."""
        shards = self._listed()
        with _damage_told():
            if any(_is_partly(_stands_for(shard), self._added) for shard in shards if _place(shard) not in self._added):
                self._added, self._sums = set(), self._begin()
        for shard in shards:
            if _place(shard) not in self._added:
                self._add(shard)
        return self._sums

    def _listed(self) -> list[Stored]:
        found = survey(self._config.state.acceptance, self._config.target, self._since)
        for shard, reason in found.skipped:
            if not reason.startswith(REPEATS):
                raise _damaged(f"{shard}: {reason}")
        return found.live

    def _add(self, shard: Stored) -> None:
        with _damage_told(), contextlib.suppress(FileNotFoundError):           # replaced meanwhile: the next listing has what replaced it
            sources = _stands_for(shard)
            rows = [] if sources and sources <= self._added else _read(shard)
            for row in rows:
                if row.at >= self._since:
                    self._sums.add(row)
            self._added |= {_place(shard), *sources}


def _place(shard: Stored) -> Place:
    return shard.folder, shard.name


def _stands_for(shard: Stored) -> frozenset[Place]:
    """What a compacted shard was made of."""
    if not is_compact(shard.name):
        return frozenset()
    with contextlib.suppress(FileNotFoundError):
        return frozenset((shard.folder, name) for name in superseded_by(shard))
    return frozenset()


def _is_partly(places: frozenset[Place], added: set[Place]) -> bool:
    return not places <= added and not places.isdisjoint(added)


def _read(shard: Stored) -> list[LiveRow]:
    """All of it before any is added: a shard counts whole or not yet."""
    with shard.open() as stream:
        table = pq.read_table(stream, columns=list(COLUMNS), use_threads=False)
    return [LiveRow(row["time"].timestamp(), row["request_id"], row["workload"], row["replica"], row["draft_version"],
                    next(iter(row["drafted"]), 0), next(iter(row["accepted"]), 0), row["emitted_tokens"], row["duration_ms"],
                    row["finish_reason"], row["mean_batch_size"]) for row in table.to_pylist()]


@contextlib.contextmanager
def _damage_told() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise _damaged(str(error)) from error


def _damaged(what: str) -> LakeError:
    return LakeError(f"a shard of the acceptance log can't be read ({what}): it is tried again; if it stays so, `tide signals verify` "
                     "names what is damaged: move it out of the lake")
