"""How close to the memory's speed is the embedded engine on a GPU, and what does capture cost there?

    python benchmarks/gpu_engine.py --json benchmarks/results/gpu_engine.json           an 8B-shaped Llama in bf16, random weights
    python benchmarks/gpu_engine.py --quick                                             a tiny one on the CPU: shows only that it runs

    T(n)           time of a target step of n requests, one row each, up to reading the tokens back; beside it the floor: bytes of
                   weights / measured copy bandwidth (bytes read and written by a copy inside the device's memory)
    figure 4       T(b (gamma + 1)) / T(b): what verifying gamma draft tokens of b requests costs over a plain step (of the TIDE paper)
    capture        recording / off at batch 1, 16, 64: the same population of requests goes on in alternating blocks, with the real
                   Recorder into a temporary lake, and with a ring that keeps nothing
    plain decode   tokens per second of one request, over the floor's

Steps take the static passes that serving takes: CUDA graphs, captured before anything is timed. Random weights do not change the time of a
step. NOT YET RUN ON A GPU: only its --quick form has run, on a CPU.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from abba import Work, alternate, median_rate, ratio
from bench_engine import Population, ask, settings
from capture_cost import OFF, RECORDING, Switch
from options import finish, parser, settle
from random_llama import bytes_read, llama_8b, random_target, tiny_llama, write_byte_tokenizer

from tide_pipeline.capture.recorder import Recorder
from tide_pipeline.config import CaptureSettings, ServeSettings
from tide_pipeline.engine.embedded import EmbeddedEngine
from tide_pipeline.engine.protocol import NullSink
from tide_pipeline.engine_spec import EngineSpec
from tide_pipeline.models.device import device_of
from tide_pipeline.models.layers import KVCache
from tide_pipeline.models.target import Target

CONTEXT = 64                       # cached positions of every request while T(n) is measured
PROMPT = "a prompt of a random model; "
GAMMA = 3


def spec_of(layers: int, max_context: int) -> EngineSpec:
    return EngineSpec("random", "embedded", "target", "1", (1, layers // 2, layers - 1), True, "", max_context, GAMMA)


def copy_bandwidth(device: torch.device, size_bytes: int, repeats: int) -> float:
    """Bytes per second, read and written, of a copy from one place to another."""
    source = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
    to = torch.empty_like(source)

    def run() -> None:
        to.copy_(source)
        int(to[-1])                                              # waits for it

    return 2e3 * size_bytes / median_ms(run, repeats)


def median_ms(run: Callable[[], object], repeats: int, warm_up: int = 3) -> float:
    """`run` must end by reading a result: a device's work is then in the time."""
    times = []
    for i in range(warm_up + repeats):
        began = time.perf_counter()
        run()
        if i >= warm_up:
            times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def step_ms(target: Target, cache: KVCache, batch: int, width: int, repeats: int) -> float:
    """Of verifying `width` rows of each of `batch` requests."""
    ids = torch.ones(batch * width, dtype=torch.long)
    positions = torch.arange(CONTEXT, CONTEXT + width).repeat(batch)

    def run() -> None:
        _, final = target.forward_rows(ids, positions, [width] * batch, cache)
        target.logits(final).argmax(-1).tolist()

    return median_ms(run, repeats)


def measure_steps(target: Target, rows: Sequence[int], bandwidth: float, repeats: int) -> dict[str, Any]:
    floor_ms = bytes_read(target) / bandwidth * 1e3
    cache = target.new_cache(max(rows), CONTEXT + 1 + GAMMA)
    plain = {n: step_ms(target, cache, n, 1, repeats) for n in rows}
    wide = {b: step_ms(target, cache, b, 1 + GAMMA, repeats) for b in rows if b * (1 + GAMMA) <= max(rows)}
    return {"floor_ms": round(floor_ms, 4), "gamma": GAMMA,
            "T_ms": {n: round(ms, 4) for n, ms in plain.items()}, "T/floor": {n: round(ms / floor_ms, 3) for n, ms in plain.items()},
            "verify_ms": {b: round(ms, 4) for b, ms in wide.items()},
            "figure_4": {b: round(ms / plain[b], 3) for b, ms in wide.items()}}


class CaptureBench:
    """An engine over the target, and a sink that records or not."""

    def __init__(self, target: Target, folder: Path, device: str, max_batch: int, max_context: int, spec: EngineSpec | None = None) -> None:
        """`spec` is the target's; without one it is a random target's."""
        write_byte_tokenizer(folder)
        self.recorder = Recorder(CaptureSettings(mode="on", max_bytes_per_hour=10**12), "random", folder / "lake", "bench")
        self.switch = Switch({RECORDING: self.recorder, OFF: NullSink()})
        serve = ServeSettings(device, max_batch=max_batch, queue_size=1_000)
        spec = spec or spec_of(target.shape.layers, max_context)
        self.engine = EmbeddedEngine(folder, spec, serve, settings().speculation, self.switch, target)
        if self.engine.cache.static is not None:
            self.engine.cache.static.warm(self.engine.cache, max_batch, max_context)

    def measure(self, batch: int, rounds: int, tokens: int) -> dict[str, Any]:
        """Blocks of `tokens` tokens a request; the requests of a batch size live from its first block to its last."""
        self._record(RECORDING, 0)                               # the recorder hears of every request's beginning
        people = Population(self.engine, [ask(PROMPT, 2 * (rounds + 1) * tokens + 8, "off") for _ in range(batch)])
        goal = itertools.count(1)

        def work(_round: int) -> int:
            return people.advance_to(next(goal) * tokens * batch)

        works: dict[str, Work] = {RECORDING: work, OFF: work}
        before = self.recorder.stats()
        blocks = alternate(works, rounds, before=self._record)
        people.leave()
        stats = self.recorder.stats()
        return {"batch": batch, "recording/off": ratio(blocks[RECORDING], blocks[OFF]),
                "tokens_per_s": {name: median_rate(some) for name, some in blocks.items()},
                "captured_tokens": int(stats["captured_tokens"]) - int(before["captured_tokens"]),
                "dropped_tokens": int(stats["dropped_tokens"]) - int(before["dropped_tokens"]),
                "dropped_tap_rows": self.engine.stats().dropped_tap_rows, "sink_errors": self.engine.stats().sink_errors}

    def _record(self, name: str, _round: int) -> None:
        self.switch.current, self.engine.ring.is_read = name, name == RECORDING


def measure_engine(args: argparse.Namespace, target: Target, floor_ms: float, batches: Sequence[int], rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="tide-bench-gpu-", dir=args.lake) as folder:
        bench = CaptureBench(target, Path(folder), args.device, max(batches), args.context)
        try:
            capture = [bench.measure(batch, rounds, args.tokens) for batch in batches]
        finally:
            bench.engine.close()
    plain = capture[0]["tokens_per_s"][OFF]
    return {"capture": capture, "plain_decode": {"tokens_per_s": plain, "floor_tokens_per_s": round(1e3 / floor_ms, 2),
                                                 "share_of_floor": round(plain * floor_ms / 1e3, 3)}}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--device", help="as serve.device; without it cuda, or cpu with --quick")
    options.add_argument("--rounds", type=int, default=40, help="pairs of blocks of the capture comparison")
    options.add_argument("--tokens", type=int, default=10, help="a block, of each request")
    options.add_argument("--repeats", type=int, default=50, help="of every step that is timed")
    options.add_argument("--context", type=int, default=1_024, help="positions of a request in the engine")
    options.add_argument("--lake", type=Path, help="where the temporary lake goes")
    args = options.parse_args()
    args.device = args.device or ("cpu" if args.quick else "cuda")
    result, device = settle(), device_of(args.device)
    if args.quick:
        args.rounds, args.tokens, args.repeats, args.context = 2, 4, 3, 128
    rows, batches = ((1, 2, 4, 8), (1, 2)) if args.quick else ((1, 2, 4, 8, 16, 32, 64, 128, 256, 512), (1, 16, 64))
    shape = (tiny_llama if args.quick else llama_8b)(args.context)
    target = random_target(shape, spec_of(shape.layers, args.context), device)
    bandwidth = copy_bandwidth(device, 1 << (24 if args.quick else 30), args.repeats)
    result |= {"device": str(device), "dtype": str(target.dtype).removeprefix("torch."), "copy_gb_per_s": round(bandwidth / 1e9, 1),
               "weights_read_gb": round(bytes_read(target) / 1e9, 3), "steps": measure_steps(target, rows, bandwidth, args.repeats)}
    result |= measure_engine(args, target, result["steps"]["floor_ms"], batches, args.rounds)
    if device.type == "cuda":
        result["peak_memory_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
    finish(result, args)


if __name__ == "__main__":
    main()
