"""Does the lake stay fast and small as it grows? The drift sensor's look, SQL, listing, writer and reader.

    python benchmarks/lake_scale.py --json benchmarks/results/lake_scale_2cores.json

    acceptance   made-up logs of 1 and 10 million rows at the same rate: 7 days of them, hourly shards as `tide signals compact` leaves
                 them and the last half hour in a shard every 2 s; and the same 10 million in 5,000 small shards. `judge_drift` is what
                 the drift sensor calls at each tick: `first_s` in a fresh process, `again_s` the ticks after it. A fresh process knows
                 the draft's life `from the log` alone, with nothing to say where it began; or where it began `from the record` of
                 deployments, as a stack that is up does; or `noted`, by a process before it. Beside it the group-by of docs/signals.md.
    signals      500 and 5,000 shards of 8 small windows: `list_windows` in a fresh process and again: the newest 4,000; up to 2,000 of
                 each workload among the newest 3,000, as training asks for them (with larger numbers); and all of them; and `count_rows`
                 of the last ten minutes, which the sensor asks for while it collects.
    writer       against writing and syncing the same bytes raw, in alternating pairs (lake_encoding.against_raw), on 16 MB of states.
    reader       rows per second with every check, over what one training step consumes (results/train_loss_html_2cores.json).

`--part acceptance` measures that alone (acceptance, signals, states). Every measurement is a process of its own; `peak_mb` is how far
its resident memory rose above what imports took. Files are in the page cache: it is the code that is measured, not the disk (the
writer's pairs do sync).
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from lake_encoding import against_raw
from options import finish, parser, settle

from tide_pipeline.capture.encode import signals_tables
from tide_pipeline.capture.names import target_folder
from tide_pipeline.capture.reader import count_rows, list_windows
from tide_pipeline.capture.rows import words_of
from tide_pipeline.capture.schema import ACCEPTANCE_SCHEMA, SIGNALS_SCHEMA
from tide_pipeline.capture.shard import write_shard, write_successor
from tide_pipeline.capture.store import Store, open_store
from tide_pipeline.capture.windows import ClosedWindow
from tide_pipeline.config import TideConfig, override, project_root
from tide_pipeline.contracts import Deployment, EngineBuild, SamplingParams
from tide_pipeline.deployment.builds import build_dir, save_build
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.drift.judge import judge_drift
from tide_pipeline.drift.views import connect

TARGET, HOUR_S = "pocket", 3600.0
WORKLOADS, DRAFT_LENGTH, ROWS_PER_REQUEST = ("en", "de", "html", "python"), 3, 3
WHOLE_LOG = """select workload, draft_version, sum(accepted[1]) / sum(drafted[1]) as first_position,
    sum(emitted_tokens) / sum(num_steps) as acceptance_length from acceptance where draft_length > 0 group by all order by workload"""


def acceptance_table(begin: float, end: float, rows: int, version: str, seed: int) -> Any:
    """`rows` blocks of steps that closed between two times, oldest first."""
    rng = np.random.default_rng(seed)
    steps = rng.integers(16, 65, rows).astype(np.int32)
    positions = np.empty((rows, DRAFT_LENGTH + 1), np.int32)
    positions[:, 0] = steps
    for i in range(DRAFT_LENGTH):
        positions[:, i + 1] = rng.binomial(positions[:, i], 0.7)
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
        "workload": chosen(WORKLOADS, (np.arange(rows) // ROWS_PER_REQUEST + seed) % len(WORKLOADS)),
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


def make_acceptance(store: Store, now: float, rows: int, seconds: float, shard_s: float, flush_s: float = 2.0) -> int:
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


def timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _resident_mb(which: str) -> float:
    """VmRSS now, or VmHWM: the most since `_measured` began. (getrusage's maximum is inherited from the parent.)"""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[which].split()[0]) / 1024


def _sensor(config: TideConfig, now: float, looks: int) -> dict[str, Any]:
    first = timed(lambda: judge_drift(config, now))
    again = [timed(lambda i=i: judge_drift(config, now + 0.1 * (i + 1))) for i in range(looks)]
    verdicts = judge_drift(config, now)
    assert len(verdicts) == len(WORKLOADS) and all(v.enough_data for v in verdicts), [v.reason for v in verdicts]
    return {"first_s": round(first, 3), "again_s": round(statistics.median(again), 3), "again_worst_s": round(max(again), 3)}


def _whole_log(config: TideConfig, threads: int, rounds: int) -> dict[str, Any]:
    def ask() -> None:
        with connect(config, threads=threads) as connection:
            assert len(connection.execute(WHOLE_LOG).fetchall()) == 2 * len(WORKLOADS)

    times = [timed(ask) for _ in range(rounds + 1)]
    return {"threads": threads, "first_s": round(times[0], 3), "again_s": round(statistics.median(times[1:]), 3)}


def deploy(config: TideConfig, version: str, at: float) -> None:
    """A deployment record that says since when `version` serves."""
    folder = build_dir(config.state.builds, config.target, version)
    folder.mkdir(parents=True)
    save_build(EngineBuild(version, config.target, "embedded", str(folder), version, "0" * 64, "0" * 64, 0.0, {}))
    DeploymentRecord(config.state.deployments, config.target).append(
        Deployment(1, config.target, {"rest": {"*": version}}, (), "stable", "benchmark", "benchmark", at))


def looks(config: TideConfig, quick: bool, now: float, seconds: float) -> dict[str, Any]:
    """`judge_drift` by what a fresh process has to go by."""
    rounds = 2 if quick else 20
    out = {"from the log": alone(quick, _sensor, config, now, rounds), "noted": alone(quick, _sensor, config, now, rounds)}
    shutil.rmtree(config.state.drift)
    deploy(config, "v2", now - seconds / 2)
    return out | {"from the record": alone(quick, _sensor, config, now, rounds)}


def _listing(root: Path, asked: dict[str, int], now: float, rounds: int) -> dict[str, Any]:
    found = []
    ask: Any = asked
    times = [timed(lambda: found.append(len(list_windows(root, TARGET, **ask).windows))) for _ in range(rounds + 1)]
    recent = [timed(lambda: count_rows(root, TARGET, since=now - 600, workloads={"en"})) for _ in range(rounds)]
    return {"asked": asked, "windows": found[-1], "first_s": round(times[0], 3), "again_s": round(statistics.median(times[1:]), 3),
            "count_rows_10_min_s": round(statistics.median(recent), 4)}


def _measured(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")           # begins VmHWM anew
    before = _resident_mb("VmRSS")
    return work() | {"peak_mb": round(_resident_mb("VmHWM") - before, 1)}


def alone(quick: bool, work: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """`work(*args)` in a fresh process; in this one if it has to be quick."""
    if quick:
        return _measured(functools.partial(work, *args))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, functools.partial(work, *args)).result()


def acceptance(folder: Path, quick: bool) -> list[dict[str, Any]]:
    big, day, out = (200_000, 8640.0, []) if quick else (10_000_000, 86_400.0, [])
    for name, rows, seconds, shard_s in (("hourly", big // 10, 0.7 * day, 0.0), ("hourly", big, 7 * day, 0.0),
                                         ("small shards", big, 7 * day, 7 * day / (100 if quick else 5_000))):
        now = time.time()
        config = override(TideConfig(), {"engine": TARGET, "state_dir": str(folder / f"{name}-{rows}")})
        shards = make_acceptance(open_store(config.state.acceptance), now, rows, seconds, shard_s, 30.0 if quick else 2.0)
        size = sum(file.size for file in open_store(config.state.acceptance).files(recursive=True))
        out.append({"layout": name, "rows": rows, "shards": shards, "mb": round(size / 1e6), "days": round(seconds / 86_400, 2),
                    "judge_drift": looks(config, quick, now, seconds),
                    "every_row": [alone(quick, _whole_log, config, threads, 1 if quick else 3) for threads in (1, 2)]})
        print(json.dumps(out[-1]), file=sys.stderr, flush=True)
    return out


def signals(folder: Path, quick: bool) -> list[dict[str, Any]]:
    out = []
    for shards in (20, 100) if quick else (500, 5000):
        root, now = folder / f"signals-{shards}", time.time()
        make_signals(open_store(root), now, shards)
        out.append({"shards": shards, "list_windows": [
            alone(quick, _listing, root, asked, now, 1 if quick else 3)
            for asked in ({"max_windows": 4000}, {"max_each": 2000, "among": 3000}, {})]})
        print(json.dumps(out[-1]), file=sys.stderr, flush=True)
    return out


def training_rows_per_s() -> float:
    """Rows that one training step reads, over its processor time: the fastest variant measured."""
    found = json.loads((project_root() / "benchmarks" / "results" / "train_loss_html_2cores.json").read_text())
    rows = found["settings"]["batch_windows"] * found["settings"]["window_rows"]
    return float(rows / min(variant["mean"]["cpu_s_per_step"] for variant in found["variants"].values()))


def writing_and_reading(folder: Path, quick: bool) -> dict[str, Any]:
    states = torch.randn(1024 if quick else 8192, 1024).bfloat16()
    found = against_raw(states, 2 if quick else 30, folder)
    trained, read = training_rows_per_s(), found["checked_reading_mb_per_cpu_s"] * 1e6 / (2 * states.shape[1])
    return {"states": found, "reader_over_training": {"read_rows_per_cpu_s": round(read), "trained_rows_per_cpu_s": round(trained),
                                                      "ratio": round(read / trained)}}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--part", action="append", choices=("acceptance", "signals", "states"), help="only this; may be given again")
    args = options.parse_args()
    parts = args.part or ["acceptance", "signals", "states"]
    result = settle()
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    sync, os.fsync = os.fsync, lambda _: None               # a lake that is made up need not survive a power cut
    with tempfile.TemporaryDirectory() as name:
        for part, measure in (("acceptance", acceptance), ("signals", signals)):
            if part in parts:
                result[part] = measure(Path(name), args.quick)
        os.fsync = sync
        if "states" in parts:
            result |= writing_and_reading(Path(name), args.quick)
    finish(result, args)


if __name__ == "__main__":
    main()
