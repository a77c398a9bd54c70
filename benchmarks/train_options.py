"""Which training options pay: the same windows, steps and seeds for each, one option changed at a time.

    python benchmarks/train_options.py --state DIR --workload html --champion engines/pocket/champion --group loss

DIR/lake holds captured windows (`benchmarks/recovery.py` shows how to make some). Each variant trains for `--steps` steps with the rate
annealed over them, so that a busy machine changes how long it takes and nothing else; CPU seconds per step are listed beside it. Reported
per variant: offline acceptance length on held-out greedy windows and on sampled ones (what the engine's greedy walk accepts), the
probability that speculative sampling at temperature 0.8 accepts the first drafted token, and the held-out windows of the other workloads.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import options
import torch

from tide_pipeline.capture.reader import WindowStates, read_states
from tide_pipeline.config import TideConfig, override
from tide_pipeline.models.checkpoint import load_draft
from tide_pipeline.models.eagle3 import Eagle3Draft
from tide_pipeline.recipes import load
from tide_pipeline.training.acceptance import acceptance_length, replay
from tide_pipeline.training.batches import whole
from tide_pipeline.training.data import WindowSplit, find_windows
from tide_pipeline.training.loop import train_draft
from tide_pipeline.training.loss import draft_ids
from tide_pipeline.training.target_head import TargetHead, target_head_of
from tide_pipeline.training.unroll import Unroll

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "loss": {
        "hard CE": {"soft_share": 0.0},
        "soft KL": {"soft_share": 1.0},
        "mixed 0.5": {"soft_share": 0.5},
        "acceptance, of the mixture": {"soft_share": 0.5, "accept_share": 1.0},
        "acceptance, of the target": {"soft_share": 1.0, "accept_share": 1.0},
        "mixed 0.5 + acceptance 0.5": {"soft_share": 0.5, "accept_share": 0.5},
    },
    "schedule": {
        "linear": {"schedule": "linear"},
        "cosine": {"schedule": "cosine"},
        "constant": {"schedule": "constant"},
        "linear, EMA 0.98": {"schedule": "linear", "ema_decay": 0.98},
        "constant, EMA 0.98": {"schedule": "constant", "ema_decay": 0.98},
        "linear, rate 3e-3": {"schedule": "linear", "learning_rate": 3e-3},
    },
    "average": {
        "hold, EMA 0.98": {"schedule": "hold", "ema_decay": 0.98},
        "constant, EMA 0.98, rate 3e-3": {"schedule": "constant", "ema_decay": 0.98, "learning_rate": 3e-3},
    },
    "reject": {
        "all rows alike": {"reject_weight": 0.0},
        "rejected rows 2": {"reject_weight": 1.0},
        "rejected rows 4": {"reject_weight": 3.0},
    },
    "confirm": {
        "linear": {"schedule": "linear", "ema_decay": 0.0},
        "constant, EMA 0.98": {"schedule": "constant", "ema_decay": 0.98},
        "hold, EMA 0.98": {"schedule": "hold", "ema_decay": 0.98},
        "hold": {"schedule": "hold", "ema_decay": 0.0},
    },
}


@torch.no_grad()
def sampled_acceptance(draft: Eagle3Draft, head: TargetHead, windows: Sequence[WindowStates], temperature: float = 0.8) -> float:
    """Mean of sum_x min(p, q) over the first drafted token of all generated rows."""
    kept, ids_U = [], draft_ids(draft)
    for w in windows:
        batch = whole([w])
        assert batch.teacher_BTD is not None
        unroll = Unroll(draft, head.embedding_VD, batch.taps_BTG, batch.positions_BT, batch.segments_BT)
        p_TU = (draft.lm_head(draft.norm(unroll.step(batch.next_ids_BT)))[0] / temperature).softmax(-1)
        q_TU = ((batch.teacher_BTD[0].float() @ head.lm_head_VD.T) / temperature).softmax(-1)[:, ids_U]
        first = max(w.window.num_prompt_tokens - 1 - w.window.start_pos, 0)
        kept.append(torch.minimum(p_TU, q_TU).sum(-1)[first:-1])
    return float(torch.cat(kept).mean())


def measure(folder: Path, head: TargetHead, data: WindowSplit, draft_length: int) -> dict[str, float]:
    draft = load_draft(folder, head.shape, head.identity)
    cold, hot = ([s for s in read_states(data.focus_held_out) if (s.window.temperature > 0) == sampled] for sampled in (False, True))

    def length(windows: Sequence[WindowStates]) -> float:
        return acceptance_length(replay(draft, head, windows, draft_length))

    return {"greedy": length(cold), "sampled_greedy_walk": length(hot), "sampled_first_token": sampled_acceptance(draft, head, hot),
            "others_greedy": length([s for s in read_states(data.replay_held_out) if s.window.temperature == 0])}


def train(config: TideConfig, workload: str, champion: Path | None, head: TargetHead, data: WindowSplit) -> dict[str, Any]:
    """Train once and measure what it exported."""
    with tempfile.TemporaryDirectory(prefix="tide-train-") as scratch:
        began = time.process_time()
        made = train_draft(config, workload=workload, out_dir=Path(scratch) / "draft", champion=champion)
        cpu = time.process_time() - began
        born = json.loads((Path(scratch) / "draft" / "provenance.json").read_text())
        found = measure(Path(scratch) / "draft", head, data, config.gate.draft_length)
    evaluations = [{k: v for k, v in point.items() if k in ("step", "acceptance_length", "averaged_acceptance_length")}
                   for point in born["curve"] if "acceptance_length" in point]
    return {**found, "cpu_s_per_step": cpu / made.steps, "steps": made.steps, "best_step": born["best_step"],
            "best_weights": born["best_weights"], "evaluations": evaluations}


def main() -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--state", type=Path, required=True, help="state directory with a lake")
    parser.add_argument("--workload", default="html")
    parser.add_argument("--champion", type=Path, help="draft to start from; default: from scratch")
    parser.add_argument("--group", choices=sorted(VARIANTS), default="loss")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="parts of the names of the variants to run, separated by |")
    parser.add_argument("--set", default="{}", help="training settings as JSON")
    args = parser.parse_args()
    result = options.settle()
    if args.quick:
        args.steps, args.seeds = 6, 1
    config = override(load(values={"state_dir": str(args.state)}), {"training": {
        "time_budget_s": 0.0, "max_steps": args.steps, "eval_every_steps": max(args.steps // 3, 1), "nice": 0, **json.loads(args.set)}})
    head = target_head_of(config)
    data = find_windows(config, args.workload, head.digest)
    result |= {"workload": args.workload, "from_scratch": args.champion is None, "steps": args.steps, "rows": data.num_rows,
               "held_out": len(data.focus_held_out), "settings": dataclasses.asdict(config.training), "variants": {}}
    if args.champion:
        result["start"] = measure(args.champion, head, data, config.gate.draft_length)
    for name, over in VARIANTS[args.group].items():
        if any(part in name for part in args.only.split("|")):
            runs = [train(override(config, {"training": {**over, "seed": seed}}), args.workload, args.champion, head, data)
                    for seed in range(args.seeds)]
            keys = [key for key, value in runs[0].items() if isinstance(value, float)]
            means = {key: round(statistics.fmean(run[key] for run in runs), 4) for key in keys}
            result["variants"][name] = {"mean": means, "runs": runs}
            print(name, means, flush=True)
    options.finish(result, args)


if __name__ == "__main__":
    main()
