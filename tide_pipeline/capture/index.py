"""Which windows a shard holds, from its small columns. Knows Parquet, and remembers; knows no layout, reads no states.

Shards never change once they are in place, so what was read is kept: of the newest shards, so that a lake of any size takes a bounded
amount of memory, and going through one that is larger than that again and again still finds the newest.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tide_pipeline.capture.digests import DIGESTS
from tide_pipeline.capture.encryption import parquet_file
from tide_pipeline.capture.names import TARGET_KEY, written_at
from tide_pipeline.capture.schema import SIGNALS_SCHEMA
from tide_pipeline.capture.store import Stored
from tide_pipeline.contracts import SignalWindow
from tide_pipeline.errors import CorruptShard

MAX_REMEMBERED = 150_000           # windows, of about half a KiB

_COST = 4                          # windows that a shard's own entry weighs as much as
_SHARED = ("tenant", "workload", "draft_version", "engine_digest")     # the same text in many windows: kept once
_PLAIN = ("request_id", "start_pos", "num_rows", "num_prompt_tokens", "prompt_digest", "digest")
_COLUMNS = ("schema_version", *_SHARED, *_PLAIN, "sampling", "closed_at")


class Memory:
    """Windows by shard, `size` of them at most; the shards written last stay."""

    def __init__(self, size: int) -> None:
        self._size, self._used, self._floor = size, 0, float("-inf")
        self._found: dict[tuple[Stored, str], tuple[SignalWindow, ...]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Windows in it."""
        return sum(len(windows) for windows in self._found.values())

    def get(self, key: tuple[Stored, str]) -> tuple[SignalWindow, ...] | None:
        return self._found.get(key)

    def put(self, key: tuple[Stored, str], windows: tuple[SignalWindow, ...]) -> None:
        with self._lock:
            if key in self._found or written_at(key[0]) <= self._floor:
                return
            self._found[key] = windows
            self._used += len(windows) + _COST
            if self._used > self._size:
                self._forget_oldest()

    def _forget_oldest(self) -> None:
        for key in sorted(self._found, key=lambda key: written_at(key[0])):
            if self._used <= self._size * 7 // 8:
                return
            self._used -= len(self._found.pop(key)) + _COST
            if (at := written_at(key[0])) != float("inf"):
                self._floor = at


_memory = Memory(MAX_REMEMBERED)
_unreadable: set[tuple[Stored, str]] = set()


def is_remembered(shard: Stored, target: str) -> bool:
    """Whether `windows_in` opens nothing, or has been seen to fail."""
    return (shard, target) in _unreadable or _memory.get((shard, target)) is not None


def windows_in(shard: Stored, target: str) -> tuple[SignalWindow, ...]:
    """Every window of a shard. Raises CorruptShard for one of another kind, OSError or ArrowException for one that can't be read."""
    found = _memory.get((shard, target))
    if found is None:
        try:
            found = _read(shard, target)
        except (CorruptShard, OSError, ValueError, KeyError, pa.ArrowException):
            _unreadable.add((shard, target))
            raise
        _memory.put((shard, target), found)
    return found


def _read(shard: Stored, target: str) -> tuple[SignalWindow, ...]:
    with shard.open() as stream, parquet_file(stream, page_checksum_verification=True) as file:
        _check_schema(file, target)
        table = file.read(columns=list(_COLUMNS), use_threads=False)
    if other := set(table.column("schema_version").to_pylist()) - set(DIGESTS):
        raise CorruptShard(f"schema version {other}, this code reads {sorted(DIGESTS)}: upgrade tide_pipeline")
    columns = {name: table.column(name).to_pylist() for name in _PLAIN}
    columns |= {name: [sys.intern(value) for value in table.column(name).to_pylist()] for name in _SHARED}
    columns |= {name: pc.struct_field(table.column("sampling"), name).to_pylist() for name in ("temperature", "top_k", "top_p")}
    columns["closed_at"] = [us / 1e6 for us in table.column("closed_at").cast(pa.int64()).to_pylist()]
    uri = shard.uri
    return tuple(SignalWindow(uri=uri, row=row, **dict(zip(columns, values, strict=True)))
                 for row, values in enumerate(zip(*columns.values(), strict=True)))


def _check_schema(file: Any, target: str) -> None:
    schema = file.schema_arrow
    for expected in SIGNALS_SCHEMA:
        if expected.name not in schema.names or not schema.field(expected.name).type.equals(expected.type):
            got = schema.field(expected.name).type if expected.name in schema.names else "none"
            raise CorruptShard(f"no signals shard: column {expected.name!r} should be {expected.type}, is {got}")
    named = (schema.metadata or {}).get(TARGET_KEY)
    if named is not None and named != target.encode():
        raise CorruptShard(f"holds signals of target {named.decode(errors='replace')!r}, not {target!r}: move it to its own folder")
