"""Does serving hold up for minutes? Many streams through front and Triton: steady, slow, leaving and whole-answer clients side by side.

    python benchmarks/soak.py --json benchmarks/results/soak_2cores.json
    python benchmarks/soak.py --py-spy PATH/TO/py-spy --pictures docs/images      CPU profiles of stub and front, taken under load

A real replica (supervisor, tritonserver, Python stub, front: as `tide up` starts them) serves the engine from a temporary state folder.

added_ms_per_token, of steady clients' whole answers alone: (time from a request's first to its last chunk at the client, less the sum of
`step_ms` of its steps as the acceptance log has them) / (tokens after the first). So it holds all that is not the model's own steps:
response sending, other requests' prompt chunks between two steps, Triton, front, both socket hops, and the client's own event loop.
`alone` is one client on an idle server; `crowd` is all of them. There, of_it_prompts_of_others is an estimate of what waiting for prompt
chunks takes: the client's time per token times the share of the run that the engine spent on prompts (tide_prefill_seconds_total).
Exit code 1: a request failed that no client gave up, or a slot was not freed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flame
import numpy as np
import psutil
import pyarrow.parquet as pq
from bench_engine import prompts_of
from options import finish, parser, settle
from soak_clients import Client, Heard, Temper, crowd, mix

from tide_pipeline.capture.layout import live_shards
from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import FinishReason
from tide_pipeline.recipes import load
from tide_pipeline.serve.client import TritonClient
from tide_pipeline.stack.local import LocalStack

DOMAINS = ("en", "py", "c", "de", "html")
PROMPT_CHARS = 300
ALONE_REQUESTS = 12
WARM_UP_REQUESTS = 8               # before memory is first looked at
SAMPLE_S = 5.0
FREED_WITHIN_S = 15.0
METRICS_LAG_S = 1.5                # they are published once a second
PROFILE_S = 30
PROFILE_HZ = {"stub": 100, "front": 500}       # the front works a fiftieth of the time
PROFILED = {"stub": "Triton's Python stub (engine and model)", "front": "the front"}
TOLD = ("queue", "ttft", "inter_token", "response_delay")       # histograms of docs/metrics.md
ENDED = "tide_requests_ended_total"
BUSY = ("tide_running_requests", "tide_waiting_requests", "tide_kv_tokens_used", "nv_inference_pending_request_count")


class Watched:
    """The processes of a replica and its front, by what they are."""

    def __init__(self, stack: LocalStack) -> None:
        pids = {ref.name: ref.pid for ref in stack.record.processes}
        children = {child.name()[:15]: child for child in psutil.Process(pids["replica"]).children(recursive=True)}
        front = psutil.Process(pids["front"])              # its keeper, with the front below it
        self.processes = {"front": next(iter(front.children()), front), "tritonserver": children["tritonserver"],
                          "stub": children["triton_python_b"]}
        self.rss: list[dict[str, float]] = []
        self._cpu = self._cpu_s()

    def sample(self) -> None:
        self.rss.append({name: round(process.memory_info().rss / 2**20, 1) for name, process in self.processes.items()})

    def start_clock(self) -> None:
        self._cpu = self._cpu_s()

    def cores_used(self, seconds: float) -> dict[str, float]:
        return {name: round((cpu_s - self._cpu[name]) / seconds, 3) for name, cpu_s in self._cpu_s().items()}

    def memory(self) -> dict[str, dict[str, float]]:
        """At the start, half-way and at the end: what grows in the second half too may leak."""
        first, half, last = self.rss[0], self.rss[len(self.rss) // 2], self.rss[-1]
        return {name: {"before_mb": first[name], "half_way_mb": half[name], "after_mb": last[name]} for name in first}

    def _cpu_s(self) -> dict[str, float]:
        return {name: sum(process.cpu_times()[:2]) for name, process in (self.processes | {"clients": psutil.Process()}).items()}


class Profiler:
    """py-spy beside the load, in processes of its own."""

    def __init__(self, args: argparse.Namespace, watched: Watched, folder: Path) -> None:
        self._pictures, self._folder = args.pictures, folder
        self._running = {name: self._record(args, name, watched.processes[name].pid) for name in PROFILED} if args.py_spy else {}

    def _record(self, args: argparse.Namespace, name: str, pid: int) -> subprocess.Popen[bytes]:
        how = ["--function", "--threads", "-r", str(PROFILE_HZ[name]), "-f", "raw", *(["--gil"] if args.gil else [])]
        return subprocess.Popen([str(args.py_spy), "record", "-d", str(PROFILE_S), *how, "-o", str(self._folder / f"{name}.folded"),
                                 "-p", str(pid)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def draw(self) -> None:
        for name, process in self._running.items():
            if process.wait():
                raise SystemExit(f"py-spy failed: run it by hand on the {name}'s pid to see why (it needs ptrace)")
            root = flame.read((self._folder / f"{name}.folded").read_text().splitlines())
            self._pictures.mkdir(parents=True, exist_ok=True)
            title = f"{PROFILED[name]}, {PROFILE_S} s of the soak: {root.samples} samples of threads that did not wait"
            (self._pictures / f"profile_{name}.svg").write_text(flame.draw(root, title))


def settings(args: argparse.Namespace, state: Path) -> TideConfig:
    folder = args.engine_dir.resolve()
    return load("pocket_cpu", values={"engine": folder.name, "engines_dir": str(folder.parent), "state_dir": str(state)})


def quantiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    return {f"p{q}": round(1e3 * float(np.quantile(seconds, q / 100)), 2) for q in (50, 95, 99)} if seconds else {}


def steps_of(config: TideConfig) -> dict[str, tuple[float, int]]:
    """Request id -> milliseconds and number of its steps, from the acceptance log."""
    found: dict[str, tuple[float, int]] = {}
    for shard in live_shards(config.state.acceptance, config.target):
        table = pq.read_table(shard, columns=["request_id", "duration_ms", "num_steps"], partitioning=None).to_pydict()
        for request_id, ms, steps in zip(*(table[name] for name in ("request_id", "duration_ms", "num_steps")), strict=True):
            before = found.get(request_id, (0.0, 0))
            found[request_id] = before[0] + ms, before[1] + steps
    return found


def added(heard: Sequence[Heard], steps: Mapping[str, tuple[float, int]], prefill_share: float = 0.0) -> dict[str, Any]:
    """What stands between the model's steps and the client's chunks, per token."""
    whole = [h for h in heard if h.temper is Temper.STEADY and h.is_whole and h.request_id in steps]
    if not whole:
        return {"requests": 0}
    client_ms = [1e3 * (h.chunk_at[-1] - h.chunk_at[0]) / (h.tokens - 1) for h in whole]
    engine_ms = [steps[h.request_id][0] / (h.tokens - 1) for h in whole]
    per_token = [client - engine for client, engine in zip(client_ms, engine_ms, strict=True)]
    return {"requests": len(whole), "client_ms_per_token": round(statistics.median(client_ms), 3),
            "step_ms_per_token": round(statistics.median(engine_ms), 3),
            "added_ms_per_token": {"median": round(statistics.median(per_token), 3), "p95": round(float(np.quantile(per_token, 0.95)), 3)},
            "of_it_prompts_of_others": round(statistics.median(client_ms) * prefill_share, 3),
            "chunks_per_step": round(sum(len(h.chunk_at) - 1 for h in whole) / sum(steps[h.request_id][1] for h in whole), 3)}


def fairness(clients: Sequence[Client]) -> dict[str, float]:
    """Tokens of the steady clients, who all ask for the same. Jain's index is 1 when they are equal."""
    tokens = [sum(h.tokens for h in client.heard) for client in clients if client.heard and client.heard[0].temper is Temper.STEADY]
    return {"streams": len(tokens), "min_tokens": min(tokens), "median_tokens": statistics.median(tokens), "max_tokens": max(tokens),
            "jain_index": round(sum(tokens) ** 2 / (len(tokens) * sum(t * t for t in tokens)), 4) if any(tokens) else 0.0}


def heard_by(clients: Sequence[Client], seconds: float) -> dict[str, Any]:
    heard = [h for client in clients for h in client.heard]
    steady = [h for h in heard if h.temper is Temper.STEADY and h.is_whole]
    errors = [h.error for h in heard if h.error]
    gaps = [b - a for h in steady for a, b in zip(h.chunk_at, h.chunk_at[1:], strict=False)]
    return {"requests": len(heard), "by_temper": dict(Counter(str(h.temper) for h in heard)), "left_by_us": sum(h.left for h in heard),
            "errors": len(errors), "first_errors": errors[:3], "tokens_of_whole_answers": sum(h.tokens for h in heard),
            "requests_per_s": round(len(heard) / seconds, 2), "fairness": fairness(clients),
            "ttft_ms": quantiles_ms([h.chunk_at[0] - h.sent_at for h in steady]), "inter_chunk_ms": quantiles_ms(gaps)}


def total(metrics: Mapping[str, float], name: str, having: str = "") -> float:
    return sum(value for series, value in metrics.items() if series.split("{")[0] == name and having in series)


def await_freed(client: TritonClient, front_url: str) -> dict[str, Any]:
    """Until nothing runs, waits or holds cache; whatever is left after so long is told."""
    began, left = time.monotonic(), {"": 1.0}
    while left and time.monotonic() - began < FREED_WITHIN_S:
        time.sleep(0.1)
        metrics = client.metrics()
        with urllib.request.urlopen(f"{front_url}/front/status", timeout=5) as answer:
            in_flight = float(json.load(answer)["in_flight"])
        seen = {name: total(metrics, name) for name in BUSY} | {"front_in_flight": in_flight}
        left = {name: value for name, value in seen.items() if value}
    return {"within_s": round(time.monotonic() - began, 1), "left": left}


async def alone(url: str, model: str, prompts: Sequence[str], requests: int) -> list[Heard]:
    client = Client(url, model, 0, Temper.STEADY, prompts)
    for i in range(WARM_UP_REQUESTS + requests):
        await client.ask(prompts[i % len(prompts)], f"alone-{i}")
    client.close()
    return client.heard[WARM_UP_REQUESTS:]


def soak(stack: LocalStack, args: argparse.Namespace, prompts: Sequence[str]) -> tuple[dict[str, Any], list[Heard], list[Heard]]:
    """The report but for what the lake will tell, and what was heard alone and in the crowd."""
    url, model, watched = stack.triton_url, stack.record.target, Watched(stack)
    server = TritonClient(url, model, stack.record.urls["triton_metrics"])
    first = asyncio.run(alone(url, model, prompts, args.alone))
    time.sleep(METRICS_LAG_S)
    before = server.metrics()
    watched.start_clock()
    profiler = Profiler(args, watched, Path(stack.state.root))
    clients = [Client(url, model, i, temper, prompts) for i, temper in enumerate(mix(args.streams))]
    began = time.perf_counter()
    asyncio.run(crowd(clients, args.seconds, watched.sample, SAMPLE_S))
    seconds, cores = time.perf_counter() - began, watched.cores_used(time.perf_counter() - began)
    profiler.draw()
    freed = await_freed(server, url)
    time.sleep(METRICS_LAG_S)
    after = server.metrics()
    watched.sample()
    grown = {name: round(total(after, name) - total(before, name), 3) for name in sorted({s.split("{")[0] for s in after})
             if name.startswith("tide_") and name.endswith(("_total", "_sum", "_count"))}
    told = {name: round(1e3 * grown[f"tide_{name}_seconds_sum"] / max(1.0, grown[f"tide_{name}_seconds_count"]), 3) for name in TOLD}
    ended = {str(reason): int(total(after, ENDED, reason) - total(before, ENDED, reason)) for reason in FinishReason}
    report = {"streams": args.streams, "seconds": round(seconds, 1), **heard_by(clients, seconds),
              "tokens_per_s": round(grown["tide_tokens_out_total"] / seconds, 1), "ended": ended, "freed": freed, "cores_used": cores,
              "memory": watched.memory(), "replica_mean_ms": told, "replica_counters": grown}
    return report, first, [h for client in clients for h in client.heard]


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=120.0)
    options.add_argument("--streams", type=int, default=32)
    options.add_argument("--py-spy", type=Path, help="py-spy's command, to take CPU profiles (30 s) while the crowd is there")
    options.add_argument("--gil", action="store_true", help="profile only who holds Python's lock")
    options.add_argument("--pictures", type=Path, default=Path("docs/images"), help="where the profiles go")
    args = options.parse_args()
    result = settle()
    args.alone = 2 if args.quick else ALONE_REQUESTS
    if args.quick:
        args.seconds, args.streams = 4.0, 8
    texts = [[prompt[:PROMPT_CHARS] for prompt in prompts_of(args.engine_dir, domain)] for domain in DOMAINS]
    prompts = [text for row in zip(*texts, strict=False) for text in row]
    with tempfile.TemporaryDirectory(prefix="tide-soak-") as folder:
        config = settings(args, Path(folder))
        stack = LocalStack.up(config, bound=True, parts=("replica",))
        try:
            report, first, heard = soak(stack, args, prompts)
        except Exception:
            for log in sorted(config.state.logs.glob("*.log")):
                sys.stderr.write(f"\n{log.name} ends with:\n{log.read_text(errors='replace')[-4_000:]}")
            raise
        finally:
            stack.down()
        steps = steps_of(config)
    share = report["replica_counters"]["tide_prefill_seconds_total"] / report["seconds"]
    result |= report | {"alone": added(first, steps), "crowd": added(heard, steps, share)}
    finish(result, args)
    return 1 if report["errors"] or report["freed"]["left"] else 0


if __name__ == "__main__":
    sys.exit(main())
