"""Memory of every process of a stack and the size of its folders, over time, and whether they stay bounded. Knows /proc and folders."""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import inject
import psutil
from soak_loop_plan import Bars

from tide_pipeline.config import StatePaths
from tide_pipeline.stack.processes import STACK_ID

MB = 1e6
DRAFTS = ("training", "builds", "mlflow")
LEAST_SAMPLES = 12                 # of a process, to say whether it grows
PASSING = ("run_worker", "trainer", "other")   # these end with their work: only their peak is told
Rss = dict[str, dict[int, float]]  # role -> process id -> MB


@dataclass(frozen=True)
class Sample:
    """One look."""

    at: float
    rss_mb: Rss
    disk_mb: dict[str, float]      # folder -> MB


@dataclass
class Watch:
    """Looks every `every_s` in a thread of its own; a look that fails is counted."""

    state: StatePaths
    stack_id: str
    every_s: float
    samples: list[Sample] = field(default_factory=list)
    errors: int = 0

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> list[Sample]:
        self._over.set()
        self._thread.join(30.0)
        return self.samples

    def _run(self) -> None:
        while not self._over.wait(self.every_s):
            try:
                self.samples.append(Sample(time.time(), rss_of(self.stack_id), disk_of(self.state)))
            except (OSError, psutil.Error):
                self.errors += 1


def rss_of(stack_id: str) -> Rss:
    """One pass over all processes."""
    found: Rss = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, IndexError):
            if process.pid != os.getpid() and process.environ().get(STACK_ID) == stack_id and (line := process.cmdline()):
                role = next((name for name, is_it in inject.ROLES.items() if is_it(line)), "other")
                found.setdefault(role, {})[process.pid] = round(process.memory_info().rss / MB, 1)
    return found


def disk_of(state: StatePaths) -> dict[str, float]:
    """Each folder of the state directory, the lake's two apart."""
    folders = {p.name: p for p in state.root.iterdir() if p.is_dir() and p.name != "lake"}
    folders |= {"signals": state.root / "lake" / "signals", "acceptance": state.root / "lake" / "acceptance"}
    return {name: round(_size(folder) / MB, 2) for name, folder in sorted(folders.items())}


def _size(folder: Path) -> int:
    total = 0
    for where, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(FileNotFoundError):           # maintenance goes on meanwhile
                total += (Path(where) / name).lstat().st_size
    return total


def memory(samples: Sequence[Sample], bars: Bars) -> dict[str, dict[str, Any]]:
    """By role: its peak, and of the process that lived longest how it grew from the second quarter of its life to the last."""
    out: dict[str, dict[str, Any]] = {}
    for role in sorted({role for sample in samples for role in sample.rss_mb}):
        lives: dict[int, list[float]] = {}
        for sample in samples:
            for pid, mb in sample.rss_mb.get(role, {}).items():
                lives.setdefault(pid, []).append(mb)
        longest = max(lives.values(), key=len)
        out[role] = {"processes": len(lives), "peak_mb": max(max(life) for life in lives.values()), "samples": len(longest)}
        if len(longest) >= LEAST_SAMPLES and role not in PASSING:
            quarter = len(longest) // 4
            before, after = statistics.median(longest[quarter : 2 * quarter]), statistics.median(longest[-quarter:])
            bound = max(bars.rss_growth_mb, bars.rss_growth * before)
            out[role] |= {"second_quarter_mb": round(before, 1), "last_quarter_mb": round(after, 1),
                          "bounded": after - before <= bound}
    return out


def disk(samples: Sequence[Sample], bars: Bars, signal_gb: float, trainings: int) -> dict[str, Any]:
    """First and last sizes, and what of it is bounded by what."""
    first, last = samples[0].disk_mb, samples[-1].disk_mb
    hours = max(samples[-1].at - samples[0].at, 1.0) / 3600

    def grown(names: Sequence[str]) -> float:
        return sum(last.get(name, 0.0) - first.get(name, 0.0) for name in names)

    rest = [name for name in last if name not in (*DRAFTS, "signals")]
    signals = {"peak_mb": max(s.disk_mb.get("signals", 0.0) for s in samples), "bound_mb": 1e3 * signal_gb * bars.signals_over}
    drafts = {"grown_mb": round(grown(DRAFTS), 1), "trainings": trainings, "bound_mb": bars.drafts_mb * max(trainings, 1)}
    others = {"grown_mb": round(grown(rest), 1), "bound_mb": round(bars.rest_mb_per_h * max(hours, 0.25), 1)}
    return {"first_mb": first, "last_mb": last, "signals": signals | {"bounded": signals["peak_mb"] <= signals["bound_mb"]},
            "drafts": drafts | {"bounded": drafts["grown_mb"] <= drafts["bound_mb"]},
            "rest": others | {"bounded": others["grown_mb"] <= others["bound_mb"]}}


def over_time(samples: Sequence[Sample], began: float, most: int = 120) -> list[dict[str, Any]]:
    """Thinned to `most` looks: seconds since it began, MB by role and by folder."""
    step = max(1, -(-len(samples) // most))
    return [{"s": round(s.at - began), "rss_mb": {role: round(sum(pids.values())) for role, pids in sorted(s.rss_mb.items())},
             "disk_mb": {name: round(mb, 1) for name, mb in s.disk_mb.items()}} for s in samples[::step]]


def unbounded(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names whose "bounded" is False."""
    return [name for name, what in found.items() if isinstance(what, dict) and what.get("bounded") is False]
