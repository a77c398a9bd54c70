"""How soon does each drift rule notice, and how often does it cry wolf? Labelled synthetic streams, and the speed of evaluation.

    python benchmarks/drift_detectors.py --json benchmarks/results/drift_detectors.json

    streams    requests (2/s, 30 drafted steps, own rates scattered by 0.12 around the workload's) put together every 5 s, over a level that
               wanders by itself (AR(1), standard deviation 0.012, correlated over minutes). `none`: days without a change. `abrupt`: a fall
               at a random moment. `gradual`: a fall spread over an hour. `decay`: over a day. `recurring`: 20 minutes of another workload
               in every hour.
    delay      from the onset to the first alarm, of those found; an alarm outside of a fall, and more than 30 minutes after the one
               before it, is false. Policies are those of `tide drift backtest`, each with one set of thresholds for all streams.
    speed      rows of a made-up log a second of processor time, one core: from Parquet to verdicts, and the rules alone.
    tick       what the drift sensor asks at each look, by `drift.policy`: the first one of a process, and those after it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from lake_scale_made import TARGET, deploy, make_acceptance
from options import finish, parser, settle

from tide_pipeline.capture.store import open_store
from tide_pipeline.config import TideConfig, override
from tide_pipeline.drift import watch
from tide_pipeline.drift.backtest import backtest
from tide_pipeline.drift.judge import judge_drift
from tide_pipeline.drift.policies import POLICIES, Running
from tide_pipeline.drift.slots import Slot

SLOT_S, REQUESTS, STEPS, SPREAD = 5.0, 10, 30, 0.12
LEVEL, HOUR_S, COOLDOWN_S = 0.74, 3600.0, 1800.0


@dataclass(frozen=True)
class Stream:
    """Levels of a workload over time, and when it had fallen."""

    kind: str
    level: np.ndarray              # of each slot
    falls: tuple[tuple[float, float], ...]     # begin and end in seconds


def streams(quick: bool) -> Iterator[Stream]:
    rng = np.random.default_rng(7)
    count, day_h = (1, 2) if quick else (10, 24)
    for _ in range(count):
        yield Stream("none", _wander(rng, day_h), ())
    for drop in (0.34, 0.15, 0.08):
        for _ in range(count):
            level, at = _wander(rng, 3), rng.uniform(1.0, 1.5) * HOUR_S
            level[int(at / SLOT_S):] -= drop
            yield Stream(f"abrupt -{drop:.2f}", level, ((at, 3 * HOUR_S),))
    for _ in range(count):
        level, at = _wander(rng, 3), rng.uniform(0.8, 1.2) * HOUR_S
        level -= 0.24 * np.clip((np.arange(len(level)) * SLOT_S - at) / HOUR_S, 0, 1)
        yield Stream("gradual -0.24/h", level, ((at, 3 * HOUR_S),))
    for _ in range(count):
        level, at = _wander(rng, day_h), HOUR_S
        level -= 0.24 * np.clip((np.arange(len(level)) * SLOT_S - at) / (day_h * HOUR_S - at), 0, 1)
        yield Stream("decay -0.24/day", level, ((at, day_h * HOUR_S),))
    for _ in range(count):
        level, falls = _wander(rng, 6), []
        for hour in range(1, 6):
            at = (hour + rng.uniform(0, 0.5)) * HOUR_S
            level[int(at / SLOT_S):int((at + HOUR_S / 3) / SLOT_S)] -= 0.25
            falls.append((at, at + HOUR_S / 3))
        yield Stream("recurring -0.25", level, tuple(falls))


def _wander(rng: np.random.Generator, hours: float) -> np.ndarray:
    slots, keep = int(hours * HOUR_S / SLOT_S), 0.98
    noise, level, out = rng.normal(0, 0.012 * (1 - keep**2) ** 0.5, slots), 0.0, np.empty(slots)
    for i in range(slots):
        level = keep * level + noise[i]
        out[i] = LEVEL + level
    return out


def slots_of(stream: Stream, seed: int) -> list[Slot]:
    rng = np.random.default_rng(seed)
    own = np.clip(rng.normal(stream.level[:, None], SPREAD, (len(stream.level), REQUESTS)), 0, 1)
    accepted = rng.binomial(STEPS, own)
    drafted = REQUESTS * STEPS
    return [Slot((i + 1) * SLOT_S, REQUESTS, drafted, int(a.sum()), float(STEPS * drafted), float(STEPS * a.sum()), float((a * a).sum()))
            for i, a in enumerate(accepted)]


def alarms(policy: str, slots: list[Slot]) -> list[float]:
    """Moments at which it spoke, COOLDOWN_S apart."""
    config, out = TideConfig(), list[float]()
    rule = Running(policy, config.drift, config.capture)
    for slot in slots:
        if rule.update(slot) and (not out or slot.time >= out[-1] + COOLDOWN_S):
            out.append(slot.time)
    return out


def score(stream: Stream, said: list[float]) -> tuple[list[float | None], int]:
    """Delay of each fall (None: missed), and false alarms. An alarm up to ten minutes after a fall's end still means that fall."""
    delays = [next((at - begin for at in said if begin <= at <= end), None) for begin, end in stream.falls]
    false = sum(not any(begin <= at <= end + 600 for begin, end in stream.falls) for at in said)
    return delays, false


def table(quick: bool) -> tuple[list[dict[str, Any]], dict[str, float]]:
    made = [(stream, slots_of(stream, i)) for i, stream in enumerate(streams(quick))]
    kinds = dict.fromkeys(stream.kind for stream, _ in made)
    rows, speed = [], {}
    for policy in POLICIES:
        begin, count = time.process_time(), 0
        row: dict[str, Any] = {"policy": policy}
        for kind in kinds:
            mine = [(stream, slots) for stream, slots in made if stream.kind == kind]
            found = [score(stream, alarms(policy, slots)) for stream, slots in mine]
            count += sum(len(slots) for _, slots in mine)
            days = sum(len(slots) for _, slots in mine) * SLOT_S / 86_400
            delays = [delay for each, _ in found for delay in each]
            hits = sorted(delay for delay in delays if delay is not None)
            row[kind] = {"falls": len(delays), "found": len(hits), "delay_s": round(statistics.median(hits), 1) if hits else None,
                         "delay_p90_s": round(hits[min(len(hits) - 1, int(0.9 * len(hits)))], 1) if hits else None,
                         "false_per_day": round(sum(false for _, false in found) / days, 2)}
        speed[policy] = round(count * REQUESTS / (time.process_time() - begin))
        rows.append(row)
    return rows, speed


def from_parquet(quick: bool) -> dict[str, Any]:
    """All of a log through one policy: what `tide drift backtest` does."""
    rows, seconds = (50_000, 3600.0) if quick else (1_000_000, 60_480.0)
    out: dict[str, Any] = {"rows": rows}
    with tempfile.TemporaryDirectory() as folder:
        now = time.time()
        config = override(TideConfig(), {"engine": TARGET, "state_dir": folder})
        make_acceptance(open_store(config.state.acceptance), now, rows, seconds, 0.0, 30.0)
        for policy in ("judge", "judge+paper"):
            begin, wall = time.process_time(), time.perf_counter()
            found = backtest(config, [policy], now - seconds, now)
            assert found.tokens > rows
            out[policy] = {"rows_per_cpu_s": round(rows / (time.process_time() - begin)),
                           "rows_per_s": round(rows / (time.perf_counter() - wall))}
    return out


def ticks(quick: bool) -> dict[str, Any]:
    """The sensor's look, by policy: 16.5 rows a second, as in 10 million of a week, of which a look reads two hours at the most."""
    seconds, looks = (3.0 * HOUR_S, 2) if quick else (4.5 * HOUR_S, 20)
    out: dict[str, Any] = {"rows_per_s": 16.5, "hours": seconds / HOUR_S}
    with tempfile.TemporaryDirectory() as folder:
        now = time.time()
        config = override(TideConfig(), {"engine": TARGET, "state_dir": folder})
        out["shards"] = make_acceptance(open_store(config.state.acceptance), now, round(16.5 * seconds), seconds, 0.0)
        deploy(config, "v2", now - seconds / 2)
        judge_drift(config, now)                               # what the draft was worth at promotion is noted
        for policy in POLICIES:
            watched = override(config, {"drift": {"policy": policy}})
            seen, spent = [], []
            for i in range(looks + 1):
                begin, cpu = time.perf_counter(), time.process_time()
                assert all(v.enough_data for v in judge_drift(watched, now + 0.1 * i))
                seen.append(time.perf_counter() - begin)
                spent.append(time.process_time() - cpu)
            out[policy] = {"first_s": round(seen[0], 3), "again_s": round(statistics.median(seen[1:]), 3),
                           "again_worst_s": round(max(seen[1:]), 3), "first_cpu_s": round(spent[0], 3),
                           "again_cpu_s": round(statistics.median(spent[1:]), 3)}
            watch._seen.clear()                                # the next policy's first look is that of a fresh process
    return out


def main() -> None:
    args = parser(__doc__).parse_args()
    result = settle()
    rows, speed = table(args.quick)
    finish(result | {"streams": rows, "rule_rows_per_cpu_s": speed, "from_parquet": from_parquet(args.quick),
                     "tick": ticks(args.quick)}, args)


if __name__ == "__main__":
    main()
