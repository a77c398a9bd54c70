"""How long the drift sensor's tick takes over a lake of any size: the real one, in a process of its own, as the log goes on.

A part of lake_scale.py.

The log goes on by a shard every 2 s, and so do ticks (Dagster's come every 5 s). Dagster's instance is that of dagster_home/dagster.yaml on
SQLite, opened anew in every tick as a code server does, with the runs of half a year in it.

    healthy            nothing has fallen
    observed           and the minute's observation of both datasets is due
    open               a workload has fallen, and too few signals are there yet
    open for long      the worst there is: all shards of signals are of the episode, and they are still too few; `catches up`: in a process
                       that has not read them yet
    asks for a run     enough are there
    lingers            a fall that is nearly certain, and `drift.linger_s` as it is by default: `wall_s` is waiting, `cpu_s` its work

`first_wall_s` is the first tick of a process, with its imports; `import_s` what those take in another one, and `first_imported_wall_s` the
first tick after them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import shutil
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
from lake_scale_made import TARGET, Feed, deploy, make_acceptance, make_signals
from machine import median_interval

from tide_pipeline import recipes
from tide_pipeline.capture.store import open_store
from tide_pipeline.config import DriftSettings, TideConfig, override, project_root
from tide_pipeline.defs.episodes import Memory
from tide_pipeline.drift.judge import judge_drift

FALLS = "html"
NEVER = 10**9                      # signal rows

Reply = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a site, and how long it is watched."""

    rows: int                      # of the acceptance log
    seconds: float                 # that it spans
    signal_shards: int = 5_000
    runs: int = 2_000              # that Dagster remembers
    ticks: int = 15
    every_s: float = 2.0
    recent_s: float = 60.0         # drift.recent_s
    rows_a_shard: int = 33         # 10 million a week
    is_quick: bool = False


QUICK = Size(5_000, 3600.0, signal_shards=50, runs=20, ticks=2, every_s=0.2, recent_s=4.0, rows_a_shard=199, is_quick=True)


class Code:
    """A code server, by one pipe."""

    def __init__(self, home: dict[str, str]) -> None:
        child = [sys.executable, str(Path(__file__).with_name("lake_scale_tick.py"))]
        self._process = subprocess.Popen(child, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | home)
        self._told()

    def tick(self, settings: Path, cursor: str, meanwhile: Callable[[], object] = lambda: None, imports: Sequence[str] = ()) -> Reply:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"settings": str(settings), "cursor": cursor, "import": [*imports]}) + "\n")
        self._process.stdin.flush()
        while not select.select([self._process.stdout], [], [], 0.5)[0]:
            meanwhile()
        return self._told()

    def _told(self) -> Reply:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that ticks ended with {self._process.wait()}: see what it wrote above")
        return dict(json.loads(line))

    def close(self) -> None:
        self._process.communicate()


@contextlib.contextmanager
def code(home: dict[str, str]) -> Iterator[Code]:
    made = Code(home)
    try:
        yield made
    finally:
        made.close()


class Site:
    """A lake that goes on, its settings, Dagster's storage."""

    def __init__(self, folder: Path, size: Size) -> None:
        self.folder, self.size, begun = folder, size, time.time()
        self.config: TideConfig = override(TideConfig(), {"engine": TARGET, "state_dir": str(folder), "stack": {"sensor_interval_s": 0},
                                                          "drift": {"linger_s": 0.0, "recent_s": size.recent_s}})
        store = open_store(self.config.state.acceptance)
        self.log_shards = make_acceptance(store, begun, size.rows, size.seconds, 0.0)
        self._collected(begun, size.signal_shards)
        deploy(self.config, "v2", begun - size.seconds / 2)
        self.feed = Feed(store, begun, size.rows_a_shard)
        self.home = {"DAGSTER_HOME": str(project_root() / "dagster_home"), "TIDE_DAGSTER_DIR": str(folder / "dagster"),
                     "TIDE_DAGSTER_LOGS": str(folder / "dagster-logs")}
        self._remember_runs()

    def goes_on(self) -> None:
        """Up to now."""
        before = self.feed.until
        self.feed.catch_up(time.time())
        if self.feed.until > before:
            self._collected(time.time(), 1)

    def settings(self, name: str, **drift: float) -> Path:
        file = self.folder / f"{name}.toml"
        recipes.freeze(override(self.config, {"drift": drift}), file)
        return file

    def ticks(self, server: Code, settings: Path, memory: Memory, change: Callable[[Memory], Memory] = lambda memory: memory, *,
              are: Callable[[Reply], bool]) -> list[Reply]:
        """As many as the size says, after one that does not count; `change` is what happens to the cursor before each."""
        told = []
        for i in range(self.size.ticks + 1):
            self.goes_on()
            told.append(server.tick(settings, memory.to_cursor(), self.goes_on))
            if i and not are(told[-1]):
                raise AssertionError(f"a tick over another state than was made: {told[-1]}")
            memory = change(Memory.from_cursor(told[-1]["cursor"]))
            time.sleep(max(0.0, self.size.every_s - told[-1]["wall_s"]))
        return told[1:]

    def first(self, settings: Path, memory: Memory, *, is_noted: bool = True) -> dict[str, Any]:
        """In two fresh processes: one imports in its tick, the other beforehand."""
        told: list[Reply] = []
        for _ in range(2):
            if not is_noted:
                shutil.rmtree(self.config.state.drift, ignore_errors=True)
            self.goes_on()
            with code(self.home) as server:
                told.append(server.tick(settings, memory.to_cursor(), imports=told[0]["imported"] if told else ()))
        a, b = told
        return {"first_wall_s": round(a["wall_s"], 3), "first_cpu_s": round(a["cpu_s"], 3), "import_s": round(b["import_s"], 3),
                "first_imported_wall_s": round(b["wall_s"], 3), "first_imported_cpu_s": round(b["cpu_s"], 3), "says": a["says"]}

    def _collected(self, now: float, shards: int) -> None:
        make_signals(open_store(self.config.state.signals), now, shards)

    def _remember_runs(self) -> None:
        """As many adaptations as upkeep; all of them are over, since a month."""
        folder = Path(self.home["TIDE_DAGSTER_DIR"])
        folder.mkdir()
        os.environ |= self.home
        with dg.DagsterInstance.get() as instance:
            for i in range(self.size.runs):
                tags = {"tide/target": TARGET, "tide/workload": FALLS, "tide/episode": str(i), "tide/attempt": "1"}
                instance.add_run(dg.DagsterRun("adapt_draft" if i % 2 else "compact_lake", str(uuid.uuid4()),
                                               status=dg.DagsterRunStatus.SUCCESS, tags=tags if i % 2 else {"tide/maintains": "lake"}))
        with contextlib.closing(sqlite3.connect(next(folder.rglob("runs.db")))) as runs, runs:
            runs.execute("update runs set create_timestamp = datetime('now', '-30 days'), update_timestamp = datetime('now', '-30 days')")


def summary(told: Sequence[Reply]) -> dict[str, Any]:
    walls, cpus = ([one[clock] for one in told] for clock in ("wall_s", "cpu_s"))
    return {"wall_s": median_interval(walls), "worst_wall_s": round(max(walls), 3), "cpu_s": median_interval(cpus),
            "says": told[-1]["says"] or f"asks for {told[-1]['asked']} run"}


def measure(folder: Path, size: Size) -> dict[str, Any]:
    begin = time.perf_counter()
    site = Site(folder, size)
    out: dict[str, Any] = {"rows": size.rows, "log_shards": site.log_shards, "signal_shards": size.signal_shards, "runs": size.runs,
                           "made_in_s": round(time.perf_counter() - begin, 1)}
    usual = site.settings("usual")
    firsts = {"healthy": (usual, is_observed(), False)}
    with code(site.home) as server:
        told = site.ticks(server, usual, Memory(), lambda memory: dataclasses.replace(memory, observed_at=time.time()),
                          are=lambda one: "lower end <" in one["says"] and "drifted" not in one["says"])
        out["healthy"] = summary(told)
        told = site.ticks(server, usual, Memory(), lambda memory: dataclasses.replace(memory, observed_at=0.0),
                          are=lambda one: one["observed"] == 2)
        out["observed"] = summary(told)
        if not size.is_quick:
            firsts |= {"healthy, baseline noted": (usual, is_observed(), True), "observed": (usual, Memory(), True)}
            for name, first in firsts.items():
                out[name] = out.get(name, {}) | site.first(first[0], first[1], is_noted=first[2])
        return out | fallen(site, server, usual)


def is_observed() -> Memory:
    """No observation is due."""
    return Memory(observed_at=time.time() + 1e6)


def fallen(site: Site, server: Code, usual: Path) -> dict[str, Any]:
    """What costs more: a workload has fallen."""
    fell_at, out = time.time(), {}
    site.feed.fallen = (FALLS,)
    while time.time() < fell_at + site.size.recent_s + 4.0:          # the recent seconds hold nothing of before
        site.goes_on()
        time.sleep(0.5)

    def is_short(one: Reply) -> bool:
        return "signal rows collected yet" in one["says"]

    told = site.ticks(server, usual, is_observed(), are=is_short)
    out["open"], opened = summary(told), Memory.from_cursor(told[-1]["cursor"])
    for_long = dataclasses.replace(opened, episodes={FALLS: dataclasses.replace(opened.episodes[FALLS], since=1.0)})
    never = site.settings("never", min_signal_rows=NEVER)
    for name in ("open for long, catches up", "open for long"):
        out[name] = summary(site.ticks(server, never, for_long, are=is_short))
    if not site.size.is_quick:
        out["open"] |= site.first(usual, opened)
        out["open for long"] |= site.first(never, for_long)
    told = site.ticks(server, site.settings("enough", min_signal_rows=100), opened, lambda _: opened, are=lambda one: one["asked"] == 1)
    out["asks for a run"] = summary(told)
    site.goes_on()
    found = next(verdict for verdict in judge_drift(site.config) if verdict.workload == FALLS)
    nearly = site.settings("nearly", min_drop=(found.drop + found.drop_low) / 2, linger_s=DriftSettings().linger_s)
    out["lingers"] = summary(site.ticks(server, nearly, is_observed(), lambda _: is_observed(), are=lambda one: not one["asked"]))
    return out


def ticks(folder: Path, rows: int, *, quick: bool) -> list[dict[str, Any]]:
    """At a tenth of the rows too, at the same rate: does it grow?"""
    week, out = 7 * 86_400.0, []
    sizes = [Size(rows // 10, week / 10), Size(rows, week)]
    for i, size in enumerate([QUICK] if quick else sizes):
        out.append(measure(folder / f"ticks-{i}", size))
        shutil.rmtree(folder / f"ticks-{i}")
        print(json.dumps(out[-1]), file=sys.stderr, flush=True)
    return out
