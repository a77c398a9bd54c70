"""How should hidden states lie in Parquet? Real states of the served target, one encoding beside the other.

    python benchmarks/lake_encoding.py --json benchmarks/results/lake_encoding.json

    binary          a cell per window, bf16 as bytes: what the lake has
    row_binary      a row per token, fixed-size binary
    row_half        a row per token, FixedSizeList of halffloat whose bits are the bf16's
    row_half_split  the same with BYTE_STREAM_SPLIT
    planes          a cell per window, all low bytes and then all high bytes: BYTE_STREAM_SPLIT by hand

each with no compression, lz4 and zstd 1. Writing is from tensors into memory, reading from memory into bf16 tensors without a copy where
the encoding allows it; both in MB of states per second of processor time, one thread, rounds of all variants in turn, best of each. Every
variant must give back every bit. Then the lake's own writer (digest, checksums, rename, fsync) against writing and syncing the same bytes
raw (`raw renamed`: to a temporary name, renamed, and the folder synced, as the lake does), in alternating blocks, wall and processor time,
and its reader with all checks.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from abba import alternate, median_rate, ratio
from options import finish, parser, settle
from torch import Tensor

from tide_pipeline.capture.encode import signals_tables
from tide_pipeline.capture.names import new_shard
from tide_pipeline.capture.reader import list_windows, read_states
from tide_pipeline.capture.rows import words_of
from tide_pipeline.capture.schema import SIGNALS_SCHEMA
from tide_pipeline.capture.shard import write_shard
from tide_pipeline.capture.store import open_store
from tide_pipeline.capture.windows import ClosedWindow
from tide_pipeline.contracts import SamplingParams
from tide_pipeline.engine.text import TextCodec
from tide_pipeline.engine_spec import load_engine_spec
from tide_pipeline.models.target import Target

CODECS = {"none": ("NONE", None), "lz4": ("LZ4", None), "zstd1": ("ZSTD", 1)}
WINDOW_ROWS = 128


def real_states(engine: Path, rows: int) -> Tensor:
    """bf16 [N, 4 D]: taps and final states of the target over its prompts."""
    spec = load_engine_spec(engine)
    target, codec = Target(engine / spec.model, spec), TextCodec(engine / spec.model)
    texts = [json.loads(line)["prompt"] for file in sorted((engine / "prompts").glob("*.jsonl")) for line in file.read_text().splitlines()]
    ids = [token for text in texts for token in codec.encode(text)]
    parts: list[Tensor] = []
    with torch.inference_mode():
        for start in range(0, min(rows, len(ids) - WINDOW_ROWS), WINDOW_ROWS):
            taps, final = target.forward(torch.tensor([ids[start:start + WINDOW_ROWS]]), torch.arange(WINDOW_ROWS)[None],
                                         target.new_cache(1, WINDOW_ROWS))
            parts.append(torch.cat((taps[0], final[0]), -1).bfloat16())
    return torch.cat(parts).clone()


@dataclass(frozen=True)
class Variant:
    """An encoding: tensor [N, W] -> Arrow array, and back to tensors [rows, W]."""

    name: str
    encode: Callable[[Tensor], Any]
    decode: Callable[[Any, int], list[Tensor]]
    options: dict[str, Any]


def _bytes(states: Tensor) -> np.ndarray:
    return states.view(torch.int16).numpy().view(np.uint8)


def _binary(data: np.ndarray, cell: int) -> Any:
    offsets = np.arange(0, data.nbytes + 1, cell, dtype=np.int64)
    return pa.Array.from_buffers(pa.large_binary(), len(offsets) - 1, [None, pa.py_buffer(offsets), pa.py_buffer(data.reshape(-1))])


def encode_planes(states: Tensor) -> Any:
    planes = _bytes(states).reshape(-1, WINDOW_ROWS * states.shape[1], 2).transpose(0, 2, 1)
    return _binary(np.ascontiguousarray(planes), WINDOW_ROWS * states.shape[1] * 2)


def decode_planes(column: Any, width: int) -> list[Tensor]:
    cells = [np.frombuffer(column[i].as_buffer(), np.uint8).reshape(2, -1) for i in range(len(column))]
    return [torch.from_numpy(np.ascontiguousarray(cell.T).view(np.int16).reshape(-1, width)).view(torch.bfloat16) for cell in cells]


def _tensor(buffer: Any, width: int) -> Tensor:
    """bf16 over an Arrow buffer, without a copy."""
    return torch.from_numpy(np.frombuffer(buffer, np.int16)).view(torch.bfloat16).view(-1, width)


def decode_binary(column: Any, width: int) -> list[Tensor]:
    return [_tensor(column[i].as_buffer(), width) for i in range(len(column))]


def encode_rows(states: Tensor) -> Any:
    data = _bytes(states)
    return pa.Array.from_buffers(pa.binary(data.shape[1]), len(data), [None, pa.py_buffer(data.reshape(-1))])


def decode_rows(column: Any, width: int) -> list[Tensor]:
    return [_tensor(part.buffers()[-1], width) for part in column.chunks]


def encode_half(states: Tensor) -> Any:
    return pa.FixedSizeListArray.from_arrays(pa.array(_bytes(states).reshape(-1).view(np.float16)), states.shape[1])


def decode_half(column: Any, width: int) -> list[Tensor]:
    return [_tensor(part.values.buffers()[-1], width) for part in column.chunks]


VARIANTS = (
    Variant("binary", lambda s: _binary(_bytes(s), WINDOW_ROWS * s.shape[1] * 2), decode_binary, {}),
    Variant("row_binary", encode_rows, decode_rows, {}),
    Variant("row_half", encode_half, decode_half, {}),
    Variant("row_half_split", encode_half, decode_half, {"use_byte_stream_split": True}),
    Variant("planes", encode_planes, decode_planes, {}),
)


def write(variant: Variant, codec: str, states: Tensor) -> Any:
    sink = pa.BufferOutputStream()
    compression, level = CODECS[codec]
    pq.write_table(pa.table({"states": variant.encode(states)}), sink, compression=compression, compression_level=level,
                   use_dictionary=False, write_statistics=False, write_page_checksum=True, **variant.options)
    return sink.getvalue()


def read(variant: Variant, data: Any, width: int) -> list[Tensor]:
    return variant.decode(pq.read_table(pa.BufferReader(data), use_threads=False).column("states"), width)


def readers(data: Any, folder: Path) -> dict[str, str]:
    """What each library makes of the column."""
    file = folder / "one.parquet"
    file.write_bytes(data)
    tries: dict[str, Callable[[], object]] = {
        "pyarrow": lambda: pq.read_table(file).schema.field("states").type,
        "duckdb": lambda: duckdb.sql(f"select any_value(typeof(states)) from '{file}'").fetchall()[0][0],
        "pandas": lambda: type(pd.read_parquet(file)["states"].iloc[0]).__name__}
    try:
        import polars

        tries["polars"] = lambda: polars.read_parquet(file).schema["states"]
    except ImportError:
        pass
    found = {}
    for name, attempt in tries.items():
        try:
            found[name] = str(attempt())
        except Exception as error:                         # what it says is the answer
            found[name] = f"no: {type(error).__name__}: {str(error)[:80]}"
    return found


def encodings(states: Tensor, rounds: int, folder: Path) -> list[dict[str, Any]]:
    cells = [(variant, codec) for variant in VARIANTS for codec in CODECS]
    best: dict[tuple[str, str], list[float]] = {(v.name, c): [float("inf")] * 2 for v, c in cells}
    sizes, opened = {}, {}
    for _ in range(rounds):
        for variant, codec in cells:
            key = (variant.name, codec)
            begin = time.process_time()
            data = write(variant, codec, states)
            middle = time.process_time()
            back = read(variant, data, states.shape[1])
            best[key] = [min(best[key][0], middle - begin), min(best[key][1], time.process_time() - middle)]
            if key not in sizes:
                assert torch.equal(torch.cat(back).view(torch.int16), states.view(torch.int16)), f"{key} does not preserve bf16"
                sizes[key], opened[key] = data.size, readers(data, folder)
    num_bytes = states.numel() * 2
    return [{"encoding": v.name, "codec": c, "size": round(sizes[v.name, c] / num_bytes, 3),
             "write_mb_per_cpu_s": round(num_bytes / 1e6 / best[v.name, c][0]),
             "read_mb_per_cpu_s": round(num_bytes / 1e6 / best[v.name, c][1]), "readers": opened[v.name, c]} for v, c in cells]


def against_raw(states: Tensor, pairs: int, folder: Path) -> dict[str, Any]:
    """The lake's writer against write and fsync of the states' bytes, and against a raw file that is put in place as safely; then reading
    with every check. All of the writer's work is on this thread."""
    hidden = states.shape[1] // 4
    windows = [ClosedWindow(f"r{i}", "t", "w", "v1", "e", "auto", SamplingParams(), 4, "0" * 32, 0, [1] * (len(rows) + 1), [],
                            [words_of(rows)], hidden, 3, True, time.time()) for i, rows in enumerate(states.split(WINDOW_ROWS))]
    store, raw_bytes = open_store(folder / "lake"), _bytes(states).tobytes()

    def lake(_: int) -> int:
        write_shard(store, new_shard("pocket", "bench"), "pocket", SIGNALS_SCHEMA, signals_tables(windows))
        return len(raw_bytes)

    def raw(pair: int, name: str = "raw") -> int:
        with (folder / f"{name}{pair}").open("wb") as file:
            file.write(raw_bytes)
            file.flush()
            os.fsync(file.fileno())
        return len(raw_bytes)

    def raw_renamed(pair: int) -> int:
        raw(pair, "temporary")
        os.replace(folder / f"temporary{pair}", folder / f"renamed{pair}")
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
        return len(raw_bytes)

    blocks = alternate({"lake": lake, "raw": raw, "raw renamed": raw_renamed}, pairs)
    found = list_windows(folder / "lake", "pocket").windows[:4 * len(windows)]
    begin = time.process_time()
    rows = sum(len(s.taps_TG) for s in read_states(found, strict=True))
    read_s = time.process_time() - begin
    return {"writer_over_raw": ratio(blocks["lake"], blocks["raw"]),
            "writer_over_raw_renamed": ratio(blocks["lake"], blocks["raw renamed"]),
            "mb": round(len(raw_bytes) / 1e6, 1), "mb_per_s": {name: round(median_rate(b) / 1e6) for name, b in blocks.items()},
            "cpu_ms": {name: round(1e3 * float(np.median([block.cpu_s for block in b])), 1) for name, b in blocks.items()},
            "best_wall_ms": {name: round(1e3 * min(block.wall_s for block in b), 1) for name, b in blocks.items()},
            "checked_reading_mb_per_cpu_s": round(rows * states.shape[1] * 2 / 1e6 / read_s)}


def main() -> None:
    args = parser(__doc__).parse_args()
    result = settle()
    pa.set_cpu_count(1)
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")     # nobody writes to what was read
    states = real_states(args.engine_dir, 1024 if args.quick else 8192)
    with tempfile.TemporaryDirectory() as folder:
        result |= {"rows": len(states), "width": states.shape[1], "encodings": encodings(states, 2 if args.quick else 12, Path(folder)),
                   "lake": against_raw(states, 2 if args.quick else 30, Path(folder))}
    finish(result, args)


if __name__ == "__main__":
    main()
