"""Training on stored states against recomputing them with the target: how much time does a step save?

    python benchmarks/recompute.py --json benchmarks/results/recompute.json

    stored       a step of the real training run (`Run.step`): states come from the run's cache, as they do after its first look
    read anew    the same, with every window of the batch read from its Parquet shard again, as in a lake far larger than the cache
    recomputed   the same, but the target runs over the tokens of the batch's windows first: what a trainer does that keeps text only

All sides draw the same batches of the same captured windows and make the same updates to drafts of their own. A window's tokens are run
from its beginning to the last row that the step needs. The target is opened twice, as the engine serves it (fp32 inputs, 16-bit weights)
and as it was trained (bf16 autocast); the comparison takes whichever is faster here. Units are token rows of the draft's batch.
Fresh states go through host memory, where batches are packed: on a GPU a trainer could keep them there; the way is in that side's time.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from abba import Work, alternate, median_rate, ratio
from captured import captured_run
from options import finish, parser, settle
from pocket_recipe import trained_network
from torch import Tensor
from training_run import open_run

from tide_pipeline.capture.reader import WindowStates
from tide_pipeline.config import TideConfig, override
from tide_pipeline.contracts import SignalWindow
from tide_pipeline.engine_spec import load_engine_spec
from tide_pipeline.models.target import Target
from tide_pipeline.training.batches import Slice
from tide_pipeline.training.run import Run
from tide_pipeline.training.scale import scaled
from tide_pipeline.training.stream import Stream, read_all

STORED, ANEW, RECOMPUTED = "stored", "read anew", "recomputed"
Forward = Callable[[Sequence[Tensor]], list[tuple[Tensor, Tensor]]]        # token ids of some texts -> taps and final states of each


def served_forward(target: Target) -> Forward:
    """The engine's own pass, texts side by side in one step."""
    def run(texts: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        widths = [len(ids) for ids in texts]
        cache = target.new_cache(len(texts), max(widths))
        taps, final = target.forward_rows(torch.cat(list(texts)), torch.cat([torch.arange(n) for n in widths]), widths, cache)
        return list(zip(taps.split(widths), final.split(widths), strict=True))

    return run


def autocast_forward(network: Any, captured: Sequence[int], device: torch.device) -> Forward:
    """The network as it was trained, texts padded to the longest: causal attention never looks at the padding behind them."""
    @torch.no_grad()
    def run(texts: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        ids_BT = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True).to(device)
        T = ids_BT.shape[1]
        taps = []
        with torch.autocast(device.type, torch.bfloat16):
            x = network.model["embed_tokens"](ids_BT)
            cos, sin = network.cos[:T].to(torch.bfloat16), network.sin[:T].to(torch.bfloat16)
            for i, block in enumerate(network.model["layers"]):
                x = block(x, cos, sin)
                if i in captured:
                    taps.append(x)
            final = network.model["norm"](x)
        return [(torch.cat([t[b, : len(ids)] for t in taps], dim=-1), final[b, : len(ids)]) for b, ids in enumerate(texts)]

    return run


class Recomputing:
    """Stands where a run's stream stands, and gives the same batches with states that the target has just computed."""

    def __init__(self, stream: Stream, forward: Forward, run: Run) -> None:
        self.stream, self.forward, self.scale_G = stream, forward, run.scale_G

    def batch(self, step: int) -> tuple[list[list[Slice[SignalWindow]]], list[list[Slice[WindowStates]]]]:
        drawn, mine = self.stream.batch(step)
        cuts = [cut for row in mine for cut in row]
        found = iter(self.forward([cut.source.token_ids[: self._needed(cut)] for cut in cuts]))
        return drawn, [[self._again(cut, *next(found)) for cut in row] for row in mine]

    def _needed(self, cut: Slice[WindowStates]) -> int:
        """Rows from the window's beginning to the teacher state of the slice's last row."""
        return min(cut.start + cut.rows + 1, cut.source.num_rows)

    def _again(self, cut: Slice[WindowStates], taps_TG: Tensor, final_TD: Tensor) -> Slice[WindowStates]:
        states = WindowStates(cut.source.window, cut.source.token_ids, taps_TG.bfloat16().cpu(), final_TD.bfloat16().cpu())
        return Slice(scaled(states, self.scale_G), cut.start, cut.rows)


class ReadingAnew:
    """The same with states read from their shards."""

    def __init__(self, stream: Stream, run: Run) -> None:
        self.stream, self.reader, self.scale_G = stream, run.reader, run.scale_G

    def batch(self, step: int) -> tuple[list[list[Slice[SignalWindow]]], list[list[Slice[WindowStates]]]]:
        drawn, mine = self.stream.batch(step)
        found = iter(read_all(self.reader, [cut.source.window for row in mine for cut in row]))
        return drawn, [[Slice(scaled(next(found), self.scale_G), cut.start, cut.rows) for cut in row] for row in mine]


def only_from_the_start(run: Run) -> int:
    """Leave out windows that begin inside a text, as their beginning is in no lake; returns how many those are."""
    sampler = run.stream.sampler
    kept = [[w for w in pool if w.start_pos == 0] for pool in (sampler.focus, sampler.replay)]
    run.stream.sampler = dataclasses.replace(sampler, focus=kept[0], replay=kept[1])
    return len(sampler.focus) + len(sampler.replay) - sum(map(len, kept))


def steps_of(run: Run, steps: int) -> Work:
    """A block: so many steps; returns the rows trained on."""
    def work(_round: int) -> int:
        before = run.counters.rows
        for _ in range(steps):
            run.step()
        if run.maker.draft.fc.weight.is_cuda:
            torch.cuda.synchronize()
        return run.counters.rows - before

    return work


def fastest_forward(config: TideConfig, sample: Sequence[Tensor], device: torch.device,
                    repeats: int) -> tuple[str, Forward, dict[str, Any]]:
    """Both ways to run the target over a batch's tokens, and the one that takes less time here."""
    spec = load_engine_spec(config.engine_dir)
    ways = {"as served": served_forward(Target(config.engine_dir / spec.model, spec, device)),
            "bf16 autocast": autocast_forward(trained_network(config.engine_dir / spec.model, device), spec.capture_layers, device)}
    took = {name: median_ms(lambda forward=forward: forward(sample), repeats) for name, forward in ways.items()}
    taps = [torch.cat([t for t, _ in forward(sample)]).float().cpu() for forward in ways.values()]
    apart = float((taps[0] - taps[1]).norm() / taps[0].norm())
    best = min(took, key=lambda name: took[name])
    return best, ways[best], {"ms": {k: round(v, 2) for k, v in took.items()}, "relative_difference_of_taps": round(apart, 5)}


def median_ms(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[1:])


def measure(config: TideConfig, workload: str, champion: Path | None, ttt_steps: int, rounds: int, steps: int,
            scratch: Path) -> dict[str, Any]:
    """One comparison at a depth of the training-time test."""
    config = override(config, {"training": {"ttt_steps": ttt_steps}})
    runs = {name: open_run(config, workload, scratch / f"{ttt_steps}-{i}", champion) for i, name in enumerate((STORED, ANEW, RECOMPUTED))}
    left_out = max(only_from_the_start(run) for run in runs.values())
    device = torch.device(config.training.device)
    _, first = runs[STORED].stream.batch(0)
    sample = [cut.source.token_ids[: cut.start + cut.rows + 1] for row in first for cut in row]
    name, forward, ways = fastest_forward(config, sample, device, 3 if rounds < 5 else 15)
    runs[ANEW].stream = ReadingAnew(runs[ANEW].stream, runs[ANEW])  # type: ignore[assignment]
    runs[RECOMPUTED].stream = Recomputing(runs[RECOMPUTED].stream, forward, runs[RECOMPUTED])  # type: ignore[assignment]
    works = {side: steps_of(run, steps) for side, run in runs.items()}
    alternate(works, 1)
    blocks = alternate(works, rounds)
    return {"ttt_steps": ttt_steps, "stored/recomputed": ratio(blocks[STORED], blocks[RECOMPUTED]),
            "read anew/recomputed": ratio(blocks[ANEW], blocks[RECOMPUTED]), "stored/read anew": ratio(blocks[STORED], blocks[ANEW]),
            "rows_per_s": {side: median_rate(some) for side, some in blocks.items()}, "target": name, "target_over_a_batch": ways,
            "windows_left_out": left_out, "last_losses": {side: round(run.counters.mean_loss, 4) for side, run in runs.items()}}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--state", type=Path, help="state directory with a lake; without it one is captured into a temporary folder")
    options.add_argument("--workload", default="html")
    options.add_argument("--ttt", type=int, nargs="+", default=[1, 3, 4], help="depths of the training-time test")
    options.add_argument("--rounds", type=int, default=32)
    options.add_argument("--steps", type=int, default=2, help="of a block")
    args = options.parse_args()
    result = settle()
    if args.quick:
        args.rounds, args.steps, args.ttt = 2, 1, [1]
    with tempfile.TemporaryDirectory(prefix="tide-recompute-") as scratch:
        result |= compare(args, Path(scratch))
    finish(result, args)


def compare(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    config, champion = captured_run(args, scratch, 200, {"eval_windows": 4})
    s = config.training
    return {"batch": f"{s.batch_windows} x {s.window_rows}", "draft_vocab_size": s.draft_vocab_size, "autocast": s.autocast,
            "depths": [measure(config, args.workload, champion, ttt, args.rounds, args.steps, scratch) for ttt in args.ttt]}


if __name__ == "__main__":
    main()
