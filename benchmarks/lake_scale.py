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
    ticks        the drift sensor itself, in Dagster: lake_scale_ticks.py has what is measured of it.
    writer       against writing and syncing the same bytes raw, in alternating pairs (lake_encoding.against_raw), on 16 MB of states.
    reader       rows per second with every check, over what one training step consumes (results/train_loss_html_2cores.json).

`--part ticks` measures that alone (acceptance, signals, ticks, states). Every measurement is a process of its own; `peak_mb` is how far
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

import torch
from lake_encoding import against_raw
from lake_scale_made import TARGET, WORKLOADS, deploy, make_acceptance, make_signals
from lake_scale_ticks import ticks
from options import finish, parser, settle

from tide_pipeline.capture.reader import count_rows, list_windows
from tide_pipeline.capture.store import open_store
from tide_pipeline.config import TideConfig, override, project_root
from tide_pipeline.drift.judge import judge_drift
from tide_pipeline.drift.views import connect

PARTS = ("acceptance", "signals", "ticks", "states")
WHOLE_LOG = """select workload, draft_version, sum(accepted[1]) / sum(drafted[1]) as first_position,
    sum(emitted_tokens) / sum(num_steps) as acceptance_length from acceptance where draft_length > 0 group by all order by workload"""


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


def acceptance(folder: Path, big: int, quick: bool) -> list[dict[str, Any]]:
    day, out = 8640.0 if quick else 86_400.0, []
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
    options.add_argument("--part", action="append", choices=PARTS, help="only this; may be given again")
    options.add_argument("--rows", type=int, help="of the largest acceptance log; 10 million")
    args = options.parse_args()
    parts, rows = args.part or PARTS, args.rows or (200_000 if args.quick else 10_000_000)
    result = settle()
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    sync, os.fsync = os.fsync, lambda _: None               # a lake that is made up need not survive a power cut
    with tempfile.TemporaryDirectory() as name:
        if "acceptance" in parts:
            result["acceptance"] = acceptance(Path(name), rows, args.quick)
        if "signals" in parts:
            result["signals"] = signals(Path(name), args.quick)
        if "ticks" in parts:
            result["ticks"] = ticks(Path(name), rows, quick=args.quick)
        os.fsync = sync
        if "states" in parts:
            result |= writing_and_reading(Path(name), args.quick)
    finish(result, args)


if __name__ == "__main__":
    main()
