"""The columns of both lake datasets; docs/signals.md explains each. Knows no files, no requests, and no torch: drift does without it.

T = rows of a window, D = hidden size, G = num_taps * D (the taps of one row), W = G or G + D (a row of the engine's ring).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

_TIME = pa.timestamp("us", tz="UTC")
STATE_COLUMNS = ("taps", "final")

SIGNALS_VERSION = 2                # of the rows of signals/; 1 had the same columns and another digest (digests.py)


def _required(name: str, kind: Any) -> Any:
    return pa.field(name, kind, nullable=False)


def _list_of(kind: Any) -> Any:
    return pa.list_(pa.field("element", kind, nullable=False))


ACCEPTANCE_SCHEMA = pa.schema([
    _required("schema_version", pa.int32()),
    _required("time", _TIME),
    _required("request_id", pa.string()),
    _required("workload", pa.string()),
    _required("tenant", pa.string()),
    _required("replica", pa.string()),
    _required("engine_digest", pa.string()),
    _required("draft_version", pa.string()),
    _required("speculation", pa.string()),
    _required("temperature", pa.float64()),
    _required("draft_length", pa.int32()),
    _required("is_probe", pa.bool_()),
    _required("num_steps", pa.int32()),
    _required("drafted", _list_of(pa.int32())),
    _required("accepted", _list_of(pa.int32())),
    _required("emitted_tokens", pa.int32()),
    _required("mean_batch_size", pa.float64()),
    _required("duration_ms", pa.float64()),
    _required("num_prompt_tokens", pa.int32()),
    _required("finish_reason", pa.string()),
    _required("ttft_ms", pa.float64()),
])

SAMPLING = pa.struct([
    _required("temperature", pa.float64()),
    _required("top_p", pa.float64()),
    _required("top_k", pa.int32()),
    _required("seed", pa.int64()),
])

REJECTED = pa.struct([_required("position", pa.int32()), _required("token", pa.int32())])

SIGNALS_SCHEMA = pa.schema([
    _required("schema_version", pa.int32()),
    _required("request_id", pa.string()),
    _required("tenant", pa.string()),
    _required("workload", pa.string()),
    _required("draft_version", pa.string()),
    _required("engine_digest", pa.string()),
    _required("speculation", pa.string()),
    _required("start_pos", pa.int32()),
    _required("num_rows", pa.int32()),
    _required("num_prompt_tokens", pa.int32()),
    _required("prompt_digest", pa.string()),
    _required("sampling", SAMPLING),
    _required("token_ids", _list_of(pa.int32())),
    _required("rejected", _list_of(REJECTED)),
    _required("hidden_size", pa.int32()),
    _required("num_taps", pa.int32()),
    _required("taps", pa.large_binary()),
    pa.field("final", pa.large_binary(), nullable=True),
    _required("closed_at", _TIME),
    _required("digest", pa.string()),
])


def parquet_options(schema: Any) -> dict[str, Any]:
    """How a dataset is written: LZ4 and dictionaries, except for states: stored as they are, without statistics.

    bf16 states shrink by a fifth under zstd 1 for twice the processor time, on a core that also serves (docs/signals.md).
    Statistics over states, tokens or prompt digests would put user data into the footer. Every page carries a CRC, because
    drift and training read some columns only, and the file's CRC says nothing of a part.
    """
    small = [path for path in _leaf_paths(schema) if path not in STATE_COLUMNS]
    return {
        "compression": {path: "NONE" if path in STATE_COLUMNS else "LZ4" for path in _leaf_paths(schema)},
        "write_page_checksum": True,
        "use_dictionary": [path for path in small if path not in ("digest", "token_ids.list.element")],
        "write_statistics": [path for path in small if "token" not in path and path != "prompt_digest"],
    }


def _leaf_paths(schema: Any) -> list[str]:
    return [path for field in schema for path in _leaves(field.name, field.type)]


def _leaves(path: str, kind: Any) -> list[str]:
    if pa.types.is_struct(kind):
        return [leaf for field in kind for leaf in _leaves(f"{path}.{field.name}", field.type)]
    if pa.types.is_list(kind):
        return _leaves(f"{path}.list.element", kind.value_type)
    return [path]


def token_bytes(token_ids: Sequence[int] | NDArray[np.integer[Any]]) -> bytes:
    """Token ids as little-endian int32: what digests are made of."""
    return np.asarray(token_ids, dtype="<i4").tobytes()
