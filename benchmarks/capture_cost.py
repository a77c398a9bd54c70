"""What does capture cost the traffic that it records, and what happens when its disk stops answering?

    python benchmarks/capture_cost.py --json benchmarks/results/capture_cost.json

    recording    every request into a temporary lake, by the real Recorder and its writer thread
    off          a sink that keeps nothing

Both serve the same requests in the same engine, in short alternating blocks, at a fixed draft length: the very same steps. Requests end at
different times. The writer writes as often as it does by default and all of its work falls into recording blocks: it stands still while the
other side is timed. Thread CPU time is the serving thread's; `process_cpu` has all of the writer's work as well.

The stall: fsync does not return for some seconds, as on a network disk that is gone. The queue fills; from there on windows must be
dropped and counted, and serving must not notice.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from abba import Block, alternate, median_rate, ratio
from bench_engine import ask, count, drafts_of, engine_of, pick, prompts_of, serve
from options import finish, parser, settle

from tide_pipeline.capture.recorder import Recorder
from tide_pipeline.capture.writer import LakeWriter
from tide_pipeline.config import CaptureSettings
from tide_pipeline.contracts import RequestClosed, RequestOpened, StepEvent
from tide_pipeline.engine.embedded import EmbeddedEngine
from tide_pipeline.engine.protocol import NullSink, Sink
from tide_pipeline.engine.taps import TapRing
from tide_pipeline.engine_spec import load_engine_spec

RECORDING, OFF = "recording", "off"
SPECULATION = "3"
STALL_FLUSH_S = 0.5                # in a stall: the disk should be missed early
PROMPT_CHARS = 120


class Switch:
    """A sink that passes events on to one of its sinks at a time, and counts the rows that each was given."""

    def __init__(self, sinks: Mapping[str, Sink]) -> None:
        self.sinks, self.current, self.rows = dict(sinks), OFF, dict.fromkeys(sinks, 0)
        self._ring: TapRing | None = None

    def turn(self, name: str) -> None:
        """An engine without a sink keeps no rows either."""
        assert self._ring is not None
        self.current, self._ring.is_read = name, name != OFF

    def attach(self, ring: TapRing, engine_digest: str) -> None:
        self._ring = ring
        for sink in self.sinks.values():
            sink.attach(ring, engine_digest)

    def on_open(self, opened: RequestOpened) -> None:
        self.sinks[self.current].on_open(opened)

    def on_step(self, events: Sequence[StepEvent]) -> None:
        self.rows[self.current] += sum(len(event.row_tokens) for event in events)
        self.sinks[self.current].on_step(events)

    def on_close(self, closed: RequestClosed) -> None:
        self.sinks[self.current].on_close(closed)

    def on_idle(self) -> None:
        self.sinks[self.current].on_idle()

    def close(self) -> None:
        for sink in self.sinks.values():
            sink.close()


class Gate:
    """Lets the writer put shards into the lake, or makes it wait before the next one."""

    def __init__(self) -> None:
        self._open, self._writing, self._real = threading.Event(), threading.Lock(), LakeWriter._write_shard
        self._open.set()

    def __call__(self, writer: LakeWriter, *what: Any) -> int:
        self._open.wait()
        with self._writing:
            return self._real(writer, *what)

    def turn(self, is_open: bool) -> None:
        """Closed: comes back when nothing is being written."""
        if is_open:
            self._open.set()
            return
        self._open.clear()
        with self._writing:
            pass


class Bench:
    """One engine at one batch size, and its two sinks."""

    def __init__(self, engine: EmbeddedEngine, switch: Switch, recorder: Recorder, gate: Gate, prompts: Sequence[str],
                 requests: int) -> None:
        self.engine, self.switch, self.recorder, self.gate = engine, switch, recorder, gate
        self.prompts, self.requests = prompts, requests
        self.process_s = dict.fromkeys((RECORDING, OFF), 0.0)

    def run(self, rounds: int, start: int = 0, stalled: bool = False) -> dict[str, list[Block]]:
        def before(name: str, _round: int) -> None:
            if not stalled:
                self.gate.turn(name == RECORDING)
            self.switch.turn(name)

        blocks = alternate({name: self._work(name) for name in (RECORDING, OFF)}, rounds, start=start, before=before)
        if not stalled:
            self.settle()
        return blocks

    def settle(self) -> None:
        """Nothing waits for the disk any more."""
        self.gate.turn(True)
        began = time.process_time()
        if not self.recorder.flush():
            raise RuntimeError(f"the temporary lake can't be written: {self.recorder.stats()['writer_error']}")
        self.process_s[RECORDING] += time.process_time() - began

    def _work(self, name: str) -> Callable[[int], int]:
        def run(round_: int) -> int:
            began = time.process_time()
            texts = pick(self.prompts, self.requests, round_)
            tokens = count(serve(self.engine, [ask(text, 24 + 8 * (i % 5), SPECULATION) for i, text in enumerate(texts)]))
            self.switch.on_idle()                                 # as the engine's own thread says when all are done
            self.process_s[name] += time.process_time() - began
            return tokens

        return run


@contextmanager
def bench_of(args: argparse.Namespace, batch: int, requests: int, capture: CaptureSettings) -> Iterator[Bench]:
    prompts, gate = prompts_of(args.engine_dir, args.domain, PROMPT_CHARS), Gate()
    capture = replace(capture, mode="on", max_bytes_per_hour=10**12)
    with tempfile.TemporaryDirectory(prefix="tide-bench-lake-", dir=args.lake) as lake, drafts_of(args.engine_dir) as drafts, \
            mock.patch.object(LakeWriter, "_write_shard", lambda *what: gate(*what)):
        recorder = Recorder(capture, load_engine_spec(args.engine_dir).name, Path(lake), "bench")
        switch = Switch({RECORDING: recorder, OFF: NullSink()})
        with engine_of(args.engine_dir, {"*": drafts.champion}, batch, switch) as engine:
            bench = Bench(engine, switch, recorder, gate, prompts, requests)
            bench.run(1)                                          # warm-up: first shard, first pages of everything
            bench.process_s = dict.fromkeys(bench.process_s, 0.0)
            yield bench


def measure(args: argparse.Namespace, batch: int, rounds: int) -> dict[str, Any]:
    with bench_of(args, batch, max(args.requests, batch), CaptureSettings(queue_windows=100_000)) as bench:
        blocks = bench.run(rounds)
        stats = bench.recorder.stats()
        return {"batch": batch, "recording/off": ratio(blocks[RECORDING], blocks[OFF]),
                "process_cpu_off/recording": round(bench.process_s[OFF] / bench.process_s[RECORDING], 4),
                "tokens_per_s": {name: median_rate(some) for name, some in blocks.items()},
                "captured_tokens": stats["captured_tokens"], "dropped_tokens": stats["dropped_tokens"],
                "written_shards": stats["written_shards"], "written_mb": round(int(stats["written_bytes"]) / 1e6, 1),
                "sink_errors": bench.engine.stats().sink_errors}


@contextmanager
def stalled_disk() -> Iterator[list[float]]:
    """Until it ends, fsync waits. Yields the times at which it was called."""
    answers, calls, real = threading.Event(), [], os.fsync

    def waiting(handle: int) -> None:
        calls.append(time.perf_counter())
        answers.wait()
        real(handle)

    with mock.patch("os.fsync", waiting):
        try:
            yield calls
        finally:
            answers.set()


def measure_stall(args: argparse.Namespace, batch: int, stalls: int, stall_s: float) -> dict[str, Any]:
    blocks: dict[str, list[Block]] = {RECORDING: [], OFF: []}
    with bench_of(args, batch, max(args.requests, batch), CaptureSettings(flush_s=STALL_FLUSH_S, queue_windows=args.stall_queue)) as bench:
        for _ in range(stalls):
            with stalled_disk() as calls:
                while not calls or time.perf_counter() - calls[0] < stall_s:
                    for name, some in bench.run(2, len(blocks[OFF]), stalled=True).items():
                        blocks[name] += some
            bench.settle()
        stats, given = bench.recorder.stats(), bench.switch.rows[RECORDING]
        accounted = int(stats["captured_tokens"]) + int(stats["dropped_tokens"])
        return {"batch": batch, "stalls": stalls, "stall_s": stall_s, "queue_windows": args.stall_queue,
                "recording/off": ratio(blocks[RECORDING], blocks[OFF]),
                "tokens_per_s": {name: median_rate(some) for name, some in blocks.items()},
                "dropped_windows": stats["dropped_windows"], "dropped_tokens": stats["dropped_tokens"],
                "captured_tokens": stats["captured_tokens"], "rows_given": given, "rows_unaccounted": given - accounted,
                "recorder_errors": stats["recorder_errors"], "sink_errors": bench.engine.stats().sink_errors}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--domain", default="en")
    options.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8], metavar="1,8")
    options.add_argument("--rounds", type=int, default=150)
    options.add_argument("--requests", type=int, default=2, help="in a block; as many as run together where those are more")
    options.add_argument("--stalls", type=int, default=4)
    options.add_argument("--stall-seconds", type=float, default=10.0)
    options.add_argument("--stall-queue", type=int, default=16, help="windows that may wait in a stall; few, so that it overflows early")
    options.add_argument("--lake", type=Path, help="where the temporary lake is made, to measure another disk")
    args = options.parse_args()
    result = settle()
    if args.quick:
        args.batches, args.rounds, args.requests, args.stalls, args.stall_seconds, args.stall_queue = [2], 1, 2, 1, 0.2, 1
    result |= {"speculation": SPECULATION, "flush_s": CaptureSettings().flush_s, "domain": args.domain}
    result["capture"] = [measure(args, batch, args.rounds) for batch in args.batches]
    result["stalled"] = measure_stall(args, max(args.batches), args.stalls, args.stall_seconds)
    finish(result, args)


if __name__ == "__main__":
    main()
