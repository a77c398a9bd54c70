"""Against the speculators library's EAGLE-3 trainer: speed, acceptance after the same time, and whether drafts pass both ways.

    sh benchmarks/peer_speculators_env.sh FOLDER                                  theirs, in an environment of its own (some minutes)
    python benchmarks/peer_speculators.py --theirs FOLDER --json benchmarks/results/peer_speculators.json

    formats      our exported draft through their converter into their model: logits at every depth against ours, in fp32; a draft that
                 their trainer saved through our loader and the gate's replay
    speed        token rows trained on per second, with the same windows, starting weights, draft vocabulary, depth, rows of a step, thread
                 and autocast; each side in a process of its own, and blocks of steps take turns (the one that waits is blocked on a pipe)
    acceptance   both train for the same time from the same weights, then our offline acceptance on the same held-out windows, whose prompts
                 neither has seen; theirs with its own default optimizer and with our optimizer and rate

peer_speculators_worker.py says what of theirs does not run on a CPU and what takes its place. Their data set holds pre-norm final states,
the lake post-norm ones: divided by the norm's weight they give the same state after their norm, as RMS norm ignores scale. Rows that count
are those with a label and a teacher, on both sides. Their data set reads a file for each window each time, which is in their time.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from abba import Block, clock, median_rate, order, ratio
from captured import fill_lake
from options import finish, parser, settle
from safetensors.torch import load_file, save_file
from torch import Tensor
from training_run import open_run

from tide_pipeline.capture.reader import WindowStates, read_states
from tide_pipeline.config import TideConfig, load_engine_spec, override
from tide_pipeline.gate.offline import paired_acceptance
from tide_pipeline.models.checkpoint import load_draft, save_draft
from tide_pipeline.models.eagle3 import Eagle3Draft
from tide_pipeline.models.weights import read_weights
from tide_pipeline.recipes import load
from tide_pipeline.training.acceptance import acceptance_length, replay
from tide_pipeline.training.batches import labelled_rows, whole
from tide_pipeline.training.loop import train_draft
from tide_pipeline.training.run import Run
from tide_pipeline.training.scale import for_raw_taps
from tide_pipeline.training.unroll import Unroll

OURS, THEIRS = "ours", "theirs"
WORKER = Path(__file__).with_name("peer_speculators_worker.py")
VARIANTS = {"their defaults (Muon 1e-3, KL)": (), "AdamW 2e-3 as ours, KL": ("--optimizer", "adamw", "--rate", "2e-3")}
FEW = 24                           # windows whose logits are compared


class Peer:
    """Their environment."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.python, self.scratch = folder / "bin" / "python", scratch
        if not self.python.is_file():
            raise SystemExit(f"{folder} is no virtual environment: make it with `sh benchmarks/peer_speculators_env.sh {folder}`")

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        with (self.scratch / "theirs.log").open("a") as log:
            return subprocess.Popen([self.python, WORKER, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                    stderr=log, text=True)

    def call(self, *arguments: object) -> dict[str, Any]:
        """Wait for its answer. Raises RuntimeError with the end of its log."""
        return self.answer(self.start(*arguments))

    def answer(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        told, _ = process.communicate()
        if process.returncode:
            raise RuntimeError("the worker failed:\n" + (self.scratch / "theirs.log").read_text()[-2_000:])
        found: dict[str, Any] = json.loads(told.splitlines()[-1])
        return found


class Comparison:
    """The windows and the starting draft, in both formats."""

    def __init__(self, config: TideConfig, workload: str, champion: Path | None, peer: Peer, scratch: Path) -> None:
        self.config, self.workload, self.peer, self.scratch = config, workload, peer, scratch
        run = open_run(config, workload, scratch / "unused", champion)
        self.head, self.spec, self.target_dir = run.head, run.head.spec, config.engine_dir / run.head.spec.model
        self.start = self._export(run)
        self.theirs = scratch / "start-theirs"
        layers = self.spec.capture_layers
        peer.call("convert", "--draft", self.start, "--target", self.target_dir, "--layers", *layers, "--out", self.theirs)
        self.held_out = list(read_states(run.windows.focus_held_out))
        self.num_windows = self._write_windows(list(read_states(run.windows.focus)))
        peer.call("dataset", "--data", scratch / "data", "--windows", self.num_windows)

    def _export(self, run: Run) -> Path:
        """What both start from: the champion with the vocabulary of these windows, in bf16 as drafts are exported."""
        draft = copy.deepcopy(run.draft)
        for_raw_taps(draft, run.scale_G)
        save_draft(draft, self.scratch / "start", self.head.identity, {"recipe": "benchmark"})
        return self.scratch / "start"

    def _write_windows(self, windows: Sequence[WindowStates]) -> int:
        folder = self.scratch / "data" / "hidden_states"
        folder.mkdir(parents=True)
        norm_D = read_weights(self.target_dir, ("model.norm.weight",))["model.norm.weight"].float()
        for i, w in enumerate(windows):
            assert w.final_TD is not None, "their trainer needs final states"
            taps_T3D = w.taps_TG.view(w.num_rows, len(self.spec.capture_layers), -1)
            last_T1D = (w.final_TD.float() / norm_D).bfloat16().unsqueeze(1)
            save_file({"hidden_states": torch.cat((taps_T3D, last_T1D), dim=1).contiguous(), "token_ids": w.token_ids[:-1].contiguous()},
                      folder / f"hs_{i}.safetensors")
        return len(windows)

    def logits_apart(self, depths: int) -> dict[str, Any]:
        """The greatest difference over some held-out windows, both in fp32, at every depth; their row t of depth j is our row t + j."""
        draft, few = load_draft(self.start, self.head.shape), self.held_out[:FEW]
        for i, w in enumerate(few):
            save_file({"taps": w.taps_TG[None].float(), "input_ids": w.token_ids[None, 1:].contiguous(),
                       "position_ids": torch.arange(1, w.num_rows + 1)[None]}, self.scratch / f"window-{i}.safetensors")
        self.peer.call("logits", "--draft", self.theirs, "--data", self.scratch, "--windows", len(few), "--depths", depths)
        worst, same, rows = [0.0] * depths, 0, 0
        for i, w in enumerate(few):
            theirs = load_file(self.scratch / f"logits-{i}.safetensors")
            for depth, ours_TU in enumerate(unrolled_logits(draft, self.head.embedding_VD, w, depths)):
                theirs_TU = theirs[f"depth{depth}"][: w.num_rows - depth]
                worst[depth] = max(worst[depth], float((ours_TU[depth:] - theirs_TU).abs().max()))
                same, rows = same + int((ours_TU[depth:].argmax(-1) == theirs_TU.argmax(-1)).sum()), rows + len(theirs_TU)
        return {"windows": len(few), "max_difference_by_depth": worst, "same_argmax": same, "rows": rows}

    def acceptance(self, folder: Path) -> float:
        """Greedy held-out windows."""
        draft = load_draft(folder, self.head.shape, self.head.identity)
        cold = [w for w in self.held_out if w.window.temperature == 0]
        return acceptance_length(replay(draft, self.head.embedding_VD, cold, self.config.gate.draft_length))

    def gain(self, ours: Path, theirs: Path) -> dict[str, float]:
        """Ours over theirs, as the gate computes it."""
        drafts = [load_draft(folder, self.head.shape, self.head.identity) for folder in (theirs, ours)]
        found = paired_acceptance(drafts[0], drafts[1], self.head.embedding_VD, self.held_out, self.config.gate, self.workload)
        return {"gain": round(found.gain, 4), "low": round(found.gain_low, 4), "high": round(found.gain_high, 4), "prompts": found.prompts}


@torch.no_grad()
def unrolled_logits(draft: Eagle3Draft, embedding_VD: Tensor, window: WindowStates, depths: int) -> list[Tensor]:
    batch = whole([window])
    unroll = Unroll(draft, embedding_VD, batch.taps_BTG, batch.positions_BT, batch.segments_BT)
    return [draft.lm_head(draft.norm(unroll.step(batch.next_ids_BT)))[0] for _ in range(depths)]


def speed(c: Comparison, args: argparse.Namespace) -> dict[str, Any]:
    """Blocks take turns between our run and their process."""
    run = open_run(c.config, c.workload, c.scratch / "unused", c.start)
    worker = c.peer.start("train", "--blocks", "--draft", c.theirs, "--data", c.scratch / "data", "--out", c.scratch / "saved",
                          "--length", c.config.training.batch_windows * c.config.training.window_rows, "--attention", args.attention,
                          "--depths", c.config.training.ttt_steps)
    assert worker.stdin and worker.stdout

    def theirs() -> Block:
        worker.stdin.write(f"{args.steps}\n")
        worker.stdin.flush()
        if not (line := worker.stdout.readline()):
            c.peer.answer(worker)
        return Block(**json.loads(line))

    def ours() -> Block:
        first, (wall, cpu) = run.counters.step, clock()
        for _ in range(args.steps):
            run.step()
        wall_end, cpu_end = clock()
        drawn = [labelled_rows(run.stream.sampler.slices(step), 1)[0] for step in range(first, run.counters.step)]
        return Block(wall_end - wall, cpu_end - cpu, sum(drawn))

    sides = {OURS: ours, THEIRS: theirs}
    blocks: dict[str, list[Block]] = {name: [] for name in sides}
    for round_ in range(-1, args.rounds):                        # the first one warms up
        for name in order(list(sides), round_):
            block = sides[name]()
            if round_ >= 0:
                blocks[name].append(block)
    worker.stdin.close()
    worker.stdin = None
    ended = c.peer.answer(worker)
    return {"ours/theirs": ratio(blocks[OURS], blocks[THEIRS]), "rows_per_s": {name: median_rate(some) for name, some in blocks.items()},
            "their_padding": round(ended["padded_rows"] / (ended["rows"] + ended["padded_rows"]), 3), "steps_of_a_block": args.steps}


def formats(c: Comparison, depths: int) -> dict[str, Any]:
    """After `speed`, whose worker has saved what it trained."""
    saved = c.scratch / "saved"
    return {"ours there": c.logits_apart(depths), "theirs here": {"loads": True, "acceptance_length": round(c.acceptance(saved), 4)},
            "refusals": c.peer.call("refusals", "--draft", c.theirs, "--out", c.scratch / "refused")}


def same_time(c: Comparison, args: argparse.Namespace) -> dict[str, Any]:
    """Seed by seed; acceptance lengths after `--seconds` of training each."""
    s = c.config.training
    rows, start = [], c.acceptance(c.start)
    for seed in range(args.seeds):
        ours = c.scratch / f"ours-{seed}"
        config = override(c.config, {"training": {"time_budget_s": args.seconds, "seed": seed}})
        made = train_draft(config, workload=c.workload, out_dir=ours, champion=c.start)
        row: dict[str, Any] = {"seed": seed, OURS: {"acceptance_length": round(c.acceptance(ours), 4), "steps": made.steps}}
        for name, options in VARIANTS.items():
            out = c.scratch / f"theirs-{seed}-{len(row)}"
            told = c.peer.call("train", "--draft", c.theirs, "--data", c.scratch / "data", "--out", out, "--attention", args.attention,
                               "--seconds", args.seconds, "--length", s.batch_windows * s.window_rows, "--depths", s.ttt_steps,
                               "--seed", seed, *options)
            row[name] = {"acceptance_length": round(c.acceptance(out), 4), "steps": told["steps"], "train_s": told["train_s"],
                         "ours_over_theirs": c.gain(ours, out)}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return {"seconds": args.seconds, "start": round(start, 4), "seeds": rows}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--theirs", type=Path, required=True, metavar="FOLDER", help="their environment")
    options.add_argument("--state", type=Path, help="state directory with a lake; without it one is captured into a temporary folder")
    options.add_argument("--workload", default="html")
    options.add_argument("--attention", default="sdpa", help="their implementation: sdpa or eager")
    options.add_argument("--parts", nargs="+", default=["speed", "acceptance"], choices=["speed", "acceptance"])
    options.add_argument("--rounds", type=int, default=32)
    options.add_argument("--steps", type=int, default=3, help="of a block")
    options.add_argument("--seconds", type=float, default=40.0, help="training time of the acceptance comparison")
    options.add_argument("--seeds", type=int, default=2)
    args = options.parse_args()
    result = settle()
    if args.quick:
        args.rounds, args.steps, args.seconds, args.seeds = 2, 1, 3.0, 1
    with tempfile.TemporaryDirectory(prefix="tide-peer-") as scratch:
        result |= compare(args, Path(scratch))
    finish(result, args)


def compare(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    config = override(load(values={"state_dir": str(args.state or scratch / "state"), "engines_dir": str(args.engine_dir.parent),
                                   "engine": args.engine_dir.name}),
                      {"training": {"time_budget_s": 0.0, "nice": 0, "min_prompts": 2, "replay_share": 0.0}})
    if args.state is None:
        fill_lake(config, {args.workload: 24 if args.quick else 320}, 24 if args.quick else 96)
    champion = args.engine_dir / load_engine_spec(args.engine_dir).champion
    c = Comparison(config, args.workload, champion, Peer(args.theirs, scratch), scratch)
    s = config.training
    result: dict[str, Any] = {"speculators": "0.9.0", "attention": args.attention, "windows": c.num_windows, "held_out": len(c.held_out),
                              "rows_of_a_step": s.batch_windows * s.window_rows, "ttt_steps": s.ttt_steps,
                              "draft_vocab_size": s.draft_vocab_size}
    if "speed" in args.parts:
        result |= {"speed": speed(c, args), "formats": formats(c, s.ttt_steps)}
    if "acceptance" in args.parts:
        result["acceptance"] = same_time(c, args)
    return result


if __name__ == "__main__":
    main()
