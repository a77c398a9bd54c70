"""Made-up lakes of any size, at any rate: an acceptance log that goes on in small shards, signals beside it, who serves since when.

Knows the formats, by capture's own writer; knows no question. Drafts are accepted at the rate USUAL, those of `fallen` workloads at FALLEN.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from tide_pipeline.capture.encode import signals_tables
from tide_pipeline.capture.names import target_folder
from tide_pipeline.capture.rows import words_of
from tide_pipeline.capture.schema import ACCEPTANCE_SCHEMA, SIGNALS_SCHEMA
from tide_pipeline.capture.shard import write_shard, write_successor
from tide_pipeline.capture.store import Store
from tide_pipeline.capture.windows import ClosedWindow
from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import Deployment, EngineBuild, SamplingParams
from tide_pipeline.deployment.builds import build_dir, save_build
from tide_pipeline.deployment.record import DeploymentRecord

TARGET, HOUR_S = "pocket", 3600.0
WORKLOADS, DRAFT_LENGTH, ROWS_PER_REQUEST = ("en", "de", "html", "python"), 3, 3
USUAL, FALLEN = 0.7, 0.1           # of drafted tokens, at any position
FLUSH_S = 2.0                      # from shard to shard of a writer


def acceptance_table(begin: float, end: float, rows: int, version: str, seed: int, fallen: Collection[str] = ()) -> Any:
    """`rows` blocks of steps that closed between two times, oldest first."""
    rng = np.random.default_rng(seed)
    steps = rng.integers(16, 65, rows).astype(np.int32)
    positions = np.empty((rows, DRAFT_LENGTH + 1), np.int32)
    positions[:, 0] = steps
    workload = (np.arange(rows) // ROWS_PER_REQUEST + seed) % len(WORKLOADS)
    rate = np.where(np.isin(workload, [WORKLOADS.index(name) for name in fallen]), FALLEN, USUAL)
    for i in range(DRAFT_LENGTH):
        positions[:, i + 1] = rng.binomial(positions[:, i], rate)
    kind = ACCEPTANCE_SCHEMA.field("drafted").type
    offsets = np.arange(0, rows * DRAFT_LENGTH + 1, DRAFT_LENGTH, dtype=np.int32)
    requests = pa.array(np.arange(rows) // ROWS_PER_REQUEST + seed * 10_000_000)
    last = np.arange(rows) % ROWS_PER_REQUEST == ROWS_PER_REQUEST - 1

    def lists(values: np.ndarray) -> Any:
        return pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(values).reshape(-1)), type=kind)

    def chosen(values: tuple[str, ...], index: np.ndarray) -> Any:
        return pa.DictionaryArray.from_arrays(index.astype(np.int32), list(values)).cast(pa.string())

    columns = {
        "time": pa.array(np.linspace(begin * 1e6, end * 1e6, rows, endpoint=False).astype(np.int64)).cast(pa.timestamp("us", tz="UTC")),
        "request_id": pc.binary_join_element_wise("request", pc.cast(requests, pa.string()), "-"),
        "workload": chosen(WORKLOADS, workload),
        "tenant": chosen(tuple(f"tenant-{i}" for i in range(20)), rng.integers(0, 20, rows)),
        "num_steps": steps, "drafted": lists(np.repeat(positions[:, :1], DRAFT_LENGTH, 1)), "accepted": lists(positions[:, 1:]),
        "emitted_tokens": positions.sum(1).astype(np.int32), "mean_batch_size": rng.uniform(1, 16, rows),
        "duration_ms": steps * rng.uniform(15, 25, rows), "num_prompt_tokens": rng.integers(10, 2000, rows).astype(np.int32),
        "finish_reason": chosen(("", "length"), last), "ttft_ms": np.where(last, rng.uniform(10, 90, rows), 0.0)}
    same = {"schema_version": 1, "replica": "replica-0", "engine_digest": "0" * 64, "draft_version": version, "speculation": "auto",
            "temperature": 0.0, "draft_length": DRAFT_LENGTH, "is_probe": False}
    columns |= {name: pa.repeat(pa.scalar(value, ACCEPTANCE_SCHEMA.field(name).type), rows) for name, value in same.items()}
    return pa.table({name: columns[name] for name in ACCEPTANCE_SCHEMA.names}, schema=ACCEPTANCE_SCHEMA)


def key_at(at: float, who: str, suffix: str = "") -> str:
    moment = time.gmtime(at)
    return (f"{target_folder(TARGET)}/date={time.strftime('%Y-%m-%d', moment)}/hour={time.strftime('%H', moment)}/"
            f"{who}-{int(at * 1e9):019d}-c{{crc:08x}}{suffix}.parquet")


def make_acceptance(store: Store, now: float, rows: int, seconds: float, shard_s: float, flush_s: float = FLUSH_S) -> int:
    """A log of `seconds` up to `now`; shards: every `shard_s`, or (0) hourly, and of the last half hour every `flush_s`. How many."""
    version_at = now - seconds / 2                          # a new draft half-way
    end, shards = now, 0
    while end > now - seconds:
        hour = (end - 1e-3) // HOUR_S * HOUR_S
        step = shard_s or (flush_s if end > now - HOUR_S / 2 else max(end - max(hour, now - seconds), 1e-3))
        begin = max(end - step, hour, now - seconds)
        count = max(1, round(rows * (end - begin) / seconds))
        table = acceptance_table(begin, end - 1e-3, count, "v2" if begin >= version_at else "v1", shards)
        if step > 60 and not shard_s:
            names = [f"replica-0-{int((begin + 2 * i) * 1e9):019d}-c{i:08x}.parquet" for i in range(int((end - begin) / 2) + 1)]
            cuts = np.linspace(0, count, len(names) + 1).astype(int)
            origins = [((name, row),) for name, a, b in zip(names, cuts, cuts[1:], strict=False) for row in range(b - a)]
            write_successor(store, key_at(end - 1e-3, "compact", ".compact"), TARGET, ACCEPTANCE_SCHEMA, [(table, origins)], names)
        else:
            write_shard(store, key_at(end - 1e-3, "replica-0"), TARGET, ACCEPTANCE_SCHEMA, [table])
        end, shards = begin, shards + 1
    return shards


def make_signals(store: Store, now: float, shards: int, windows: int = 8, hidden: int = 8, rows: int = 32) -> None:
    """One shard every 10 s up to `now`."""
    states = torch.randn(rows, 4 * hidden).bfloat16()
    for i in range(shards):
        at = now - 10.0 * i
        made = [ClosedWindow(f"request-{i}-{j}", "acme", WORKLOADS[j % 4], "v1", "0" * 64, "auto", SamplingParams(), 4, f"{i:016x}{j:016x}",
                             0, [1] * (rows + 1), [], [words_of(states)], hidden, 3, True, at - 1 - 0.1 * j) for j in range(windows)]
        write_shard(store, key_at(at, "replica-0"), TARGET, SIGNALS_SCHEMA, signals_tables(made))


@dataclass
class Feed:
    """A log that goes on: a shard of `rows` rows for every 2 s, as a writer leaves them. Every shard has requests of its own."""

    store: Store
    until: float                   # Unix seconds; all before is in the log
    rows: int                      # of a shard
    fallen: Collection[str] = ()   # workloads
    seed: int = 100_000            # above those of make_acceptance

    def catch_up(self, now: float) -> None:
        while self.until + FLUSH_S <= now:
            begin, self.until, self.seed = self.until, self.until + FLUSH_S, self.seed + 1
            table = acceptance_table(begin, self.until - 1e-3, self.rows, "v2", self.seed, self.fallen)
            write_shard(self.store, key_at(self.until - 1e-3, "replica-0"), TARGET, ACCEPTANCE_SCHEMA, [table])


def deploy(config: TideConfig, version: str, at: float) -> None:
    """A deployment record that says since when `version` serves."""
    folder = build_dir(config.state.builds, config.target, version)
    folder.mkdir(parents=True)
    save_build(EngineBuild(version, config.target, "embedded", str(folder), version, "0" * 64, "0" * 64, 0.0, {}))
    DeploymentRecord(config.state.deployments, config.target).append(
        Deployment(1, config.target, {"rest": {"*": version}}, (), "stable", "benchmark", "benchmark", at))
