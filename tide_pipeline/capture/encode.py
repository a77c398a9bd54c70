"""Closed windows and acceptance rows as Arrow tables. Knows the schema; knows neither partitions nor threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tide_pipeline.capture.digests import window_digest
from tide_pipeline.capture.rows import write_words
from tide_pipeline.capture.schema import ACCEPTANCE_SCHEMA, SIGNALS_SCHEMA, SIGNALS_VERSION
from tide_pipeline.capture.windows import ClosedWindow
from tide_pipeline.contracts import SCHEMA_VERSION, AcceptanceRow

GROUP_BYTES = 4 * 2**20            # of states per row group: what a reader holds at a time, and what stays in a cache on its way

_TEXT = ("request_id", "workload", "tenant", "replica", "engine_digest", "draft_version", "speculation", "finish_reason")


def acceptance_tables(rows: Sequence[AcceptanceRow]) -> Iterator[Any]:
    """One table with all rows."""
    columns: dict[str, list[Any]] = {"schema_version": [SCHEMA_VERSION] * len(rows)}
    for name in ACCEPTANCE_SCHEMA.names[1:]:
        values = [getattr(row, name) for row in rows]
        columns[name] = [_text(v) for v in values] if name in _TEXT else values
    columns["time"] = [_microseconds(row.time) for row in rows]
    yield pa.table(columns, schema=ACCEPTANCE_SCHEMA)


def signals_tables(windows: Sequence[ClosedWindow]) -> Iterator[Any]:
    """The windows in row groups of about GROUP_BYTES, in order."""
    group: list[ClosedWindow] = []
    size = 0
    for window in windows:
        if group and size + window.num_bytes > GROUP_BYTES:
            yield _signals_table(group)
            group, size = [], 0
        group.append(window)
        size += window.num_bytes
    if group:
        yield _signals_table(group)


def _signals_table(windows: Sequence[ClosedWindow]) -> Any:
    taps = _StateColumn([w.num_rows * w.num_taps * w.hidden_size * 2 for w in windows])
    final = _StateColumn([w.num_rows * w.hidden_size * 2 if w.with_final else None for w in windows])
    tokens = [np.asarray(window.token_ids, "<i4") for window in windows]
    digests = []
    for i, window in enumerate(windows):
        width_G = window.num_taps * window.hidden_size
        write_words(window.words, slice(width_G), taps.cell(i))
        if window.with_final:
            write_words(window.words, slice(width_G, None), final.cell(i))
        digests.append(window_digest(tokens[i], taps.cell(i), final.cell(i) if window.with_final else None))
    columns: dict[str, Any] = {name: [_text(getattr(w, name)) for w in windows]
                               for name in ("request_id", "tenant", "workload", "draft_version", "engine_digest", "speculation",
                                            "prompt_digest")}
    columns |= {name: [getattr(w, name) for w in windows]
                for name in ("start_pos", "num_rows", "num_prompt_tokens", "hidden_size", "num_taps")}
    columns |= {
        "schema_version": [SIGNALS_VERSION] * len(windows),
        "token_ids": _lists(tokens, SIGNALS_SCHEMA.field("token_ids").type),
        "sampling": [{"temperature": w.sampling.temperature, "top_p": w.sampling.top_p, "top_k": w.sampling.top_k,
                      "seed": _int64(w.sampling.seed)} for w in windows],
        "rejected": [[{"position": p, "token": t} for p, t in w.rejected] for w in windows],
        "closed_at": [_microseconds(w.closed_at) for w in windows],
        "taps": taps.array(), "final": final.array(), "digest": digests,
    }
    return pa.table({name: columns[name] for name in SIGNALS_SCHEMA.names}, schema=SIGNALS_SCHEMA)


class _StateColumn:
    """A large_binary column whose cells are written in place: states are copied once on their way to Parquet.

    Its memory is pyarrow's, which keeps what was freed: fresh pages from the kernel cost more than the copy.
    """

    def __init__(self, sizes: Sequence[int | None]) -> None:
        self._is_valid = np.array([size is not None for size in sizes])
        self._offsets = _offsets([size or 0 for size in sizes]).astype(np.int64)
        self._buffer = pa.allocate_buffer(int(self._offsets[-1]))
        self._data: NDArray[np.uint8] = np.frombuffer(self._buffer, np.uint8)

    def cell(self, i: int) -> NDArray[np.uint8]:
        return self._data[self._offsets[i]:self._offsets[i + 1]]

    def array(self) -> Any:
        valid = None if self._is_valid.all() else pa.py_buffer(np.packbits(self._is_valid, bitorder="little"))
        return pa.Array.from_buffers(pa.large_binary(), len(self._is_valid), [valid, pa.py_buffer(self._offsets), self._buffer])


def _lists(values: Sequence[NDArray[np.int32]], kind: Any) -> Any:
    offsets = _offsets([len(v) for v in values]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(values)), type=kind)


def _offsets(sizes: Sequence[int]) -> NDArray[np.int64]:
    offsets: NDArray[np.int64] = np.concatenate(([0], np.cumsum(sizes)))
    return offsets


def _text(value: object) -> str:
    """Valid UTF-8 of a client's text: a lone surrogate in one request id must not cost a shard."""
    return str(value).encode("utf-8", "replace").decode()


def _int64(value: int) -> int:
    """Seeds are any integer to a client; the same bits, signed."""
    return (value + 2**63) % 2**64 - 2**63


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)
