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
import json
import tempfile
from pathlib import Path
from typing import Any

from abba import Block, clock, median_rate, order, ratio
from captured import captured_run
from options import finish, parser, settle
from peer_sides import Comparison, Peer
from training_run import open_run

from tide_pipeline.config import override
from tide_pipeline.training.batches import labelled_rows
from tide_pipeline.training.loop import train_draft

OURS, THEIRS = "ours", "theirs"
VARIANTS = {"their defaults (Muon 1e-3, KL)": (), "AdamW 2e-3 as ours, KL": ("--optimizer", "adamw", "--rate", "2e-3")}


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
            "their_padding": round(ended["padded_rows"] / (ended["rows"] + ended["padded_rows"]), 3),
            "their_reading": round(ended["read_s"] / ended["train_s"], 3), "steps_of_a_block": args.steps}


def formats(c: Comparison, depths: int) -> dict[str, Any]:
    """After `speed`, whose worker has saved what it trained."""
    saved = c.scratch / "saved"
    return {"ours there": c.logits_apart(depths), "theirs here": {"loads": True, "acceptance_length": round(c.acceptance(saved), 4)},
            "refusals": c.peer.call("refusals", "--draft", c.theirs, "--out", c.scratch / "refused")}


def same_time(c: Comparison, args: argparse.Namespace) -> dict[str, Any]:
    """Seed by seed; acceptance lengths after `--seconds` of training each."""
    s = c.config.training
    rows, start = [], c.acceptance(c.start)
    for seed in args.seeds:
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
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    args = options.parse_args()
    result = settle()
    if args.quick:
        args.rounds, args.steps, args.seconds, args.seeds = 2, 1, 3.0, [0]
    with tempfile.TemporaryDirectory(prefix="tide-peer-") as scratch:
        result |= compare(args, Path(scratch))
    finish(result, args)


def compare(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    config, champion = captured_run(args, scratch, 320, {"replay_share": 0.0})
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
