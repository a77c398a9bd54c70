"""Can states be stored in fewer than 2 bytes a value, and the draft trained on them be as good?

    python benchmarks/lake_bits.py --state DIR --workload html --json benchmarks/results/lake_bits_2cores.json

DIR/collected/<workload> are lakes of `recovery.py --collect`. For each encoding a lake whose states went through it and back, and the same
training on it (steps, seeds, windows, order of batches). The drafts are judged on bf16 states, which is what serving feeds them, of prompts
that nothing was trained on: the unseen ones and the held-out ones. `loss` is the acceptance length lost against bf16, seed by seed on the
same prompts; its 95 % interval is of a bootstrap that draws seeds, then prompts. An encoding is proven if the whole interval is below 0.02.

    int8 row        a scale for each row and layer: the largest value is 127
    int8 group      a scale for each row and 32 channels
    e4m3, e5m2      float8 with a scale for each row and layer
    rank r          each layer's states projected on the r main directions of the training windows, kept in bf16
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import options
import torch
from recovery import windows_of
from torch import Tensor

from tide_pipeline.capture.reader import WindowStates
from tide_pipeline.capture.windows import ClosedWindow
from tide_pipeline.capture.writer import LakeWriter
from tide_pipeline.config import TideConfig, override
from tide_pipeline.contracts import SamplingParams
from tide_pipeline.engine_spec import load_engine_spec
from tide_pipeline.models.checkpoint import load_draft
from tide_pipeline.recipes import load
from tide_pipeline.training.acceptance import replay
from tide_pipeline.training.data import is_held_out
from tide_pipeline.training.loop import train_draft
from tide_pipeline.training.target_head import TargetHead, target_head_of

OLD = ("en", "c")


@dataclass(frozen=True)
class Encoding:
    """States of one layer [N, D] there and back, and the bytes a value takes."""

    name: str
    bytes_per_value: float
    there_and_back: Callable[[Tensor], Tensor]


def int8(group: int) -> Callable[[Tensor], Tensor]:
    def code(x_ND: Tensor) -> Tensor:
        x = x_ND.view(len(x_ND), -1, group)
        scale = (x.abs().amax(-1, keepdim=True) / 127).bfloat16().float().clamp(min=1e-30)
        return ((x / scale).round().clamp(-127, 127).to(torch.int8).float() * scale).view_as(x_ND)

    return code


def float8(kind: torch.dtype) -> Callable[[Tensor], Tensor]:
    def code(x_ND: Tensor) -> Tensor:
        scale = (x_ND.abs().amax(-1, keepdim=True) / torch.finfo(kind).max).bfloat16().float().clamp(min=1e-30)
        return (x_ND / scale).clamp(-torch.finfo(kind).max, torch.finfo(kind).max).to(kind).float() * scale

    return code


def low_rank(basis_DR: Tensor, mean_D: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x_ND: ((x_ND - mean_D) @ basis_DR).bfloat16().float() @ basis_DR.T + mean_D


def encodings(windows: Sequence[WindowStates], D: int) -> dict[str, list[Encoding]]:
    """By name, one for each stored layer: all alike but for the directions of a projection."""
    same = [Encoding("bf16", 2.0, lambda x: x), Encoding("int8 row", 1 + 2 / D, int8(D)), Encoding("int8 group", 1 + 2 / 32, int8(32)),
            Encoding("e4m3", 1 + 2 / D, float8(torch.float8_e4m3fn)), Encoding("e5m2", 1 + 2 / D, float8(torch.float8_e5m2))]
    found = {e.name: [e] * (states_of(windows[0]).shape[1] // D) for e in same}
    layers = torch.cat([states_of(w) for w in windows]).float().split(D, dim=-1)
    for rank in (D // 2, D // 4):
        projections = []
        for x_ND in layers:
            mean_D = x_ND.mean(0)
            basis = torch.linalg.eigh((x_ND - mean_D).T @ (x_ND - mean_D))[1][:, -rank:].contiguous()
            projections.append(Encoding(f"rank {rank}", 2 * rank / D, low_rank(basis, mean_D)))
        found[f"rank {rank}"] = projections
    return found


def states_of(w: WindowStates) -> Tensor:
    """bf16 [T, taps and final side by side]."""
    return w.taps_TG if w.final_TD is None else torch.cat((w.taps_TG, w.final_TD), dim=-1)


def write_lake(config: TideConfig, windows: Sequence[WindowStates], layers: Sequence[Encoding], lake: Path, D: int) -> float:
    """The windows with their states through the encoding; returns the relative error of a value, root mean square."""
    config = override(config, {"capture": {"queue_windows": len(windows) + 1}})
    writer, wrong, whole = LakeWriter(config.capture, config.target, lake, "bench"), 0.0, 0.0
    for w in windows:
        x = states_of(w).float()
        coded = torch.cat([e.there_and_back(part) for e, part in zip(layers, x.split(D, dim=-1), strict=True)], dim=-1).bfloat16()
        wrong, whole = wrong + float((coded.float() - x).square().sum()), whole + float(x.square().sum())
        s = w.window
        while not writer.offer_window(ClosedWindow(
                s.request_id, s.tenant, s.workload, s.draft_version, s.engine_digest, "3", SamplingParams(temperature=s.temperature),
                s.num_prompt_tokens, s.prompt_digest, s.start_pos, w.token_ids.tolist(), [], coded, D, coded.shape[1] // D - 1, True,
                s.closed_at)):
            time.sleep(0.05)
    writer.flush()
    writer.close()
    return (wrong / whole) ** 0.5


def train(config: TideConfig, workload: str, lake: Path, champion: Path, seed: int, head: TargetHead,
          unseen: Sequence[WindowStates]) -> Any:
    """[2, prompts]: accepted tokens and steps on the unseen prompts, by a draft trained on the lake."""
    config = override(config, {"lake": str(lake), "training": {"seed": seed}})
    with tempfile.TemporaryDirectory() as scratch:
        train_draft(config, workload=workload, out_dir=Path(scratch) / "draft", champion=champion)
        draft = load_draft(Path(scratch) / "draft", head.shape, head.identity)
        found = list(replay(draft, head, unseen, config.gate.draft_length))
    return np.array([[sum(r.accepted) for r in found], [r.steps for r in found]])


def lost(base_S2P: Any, other_S2P: Any) -> dict[str, float]:
    """Acceptance length lost against bf16 and its interval: seeds are drawn, then prompts, the same for both."""
    rng, (S, _, P) = np.random.default_rng(0), base_S2P.shape

    def loss(seeds: Any, prompts: Any) -> float:
        a, b = (x[seeds][:, :, prompts].sum(-1) for x in (base_S2P, other_S2P))
        return float((a[:, 0] / a[:, 1]).mean() - (b[:, 0] / b[:, 1]).mean())

    drawn = [loss(rng.integers(0, S, S), rng.integers(0, P, P)) for _ in range(2000)]
    return {"loss": round(loss(np.arange(S), np.arange(P)), 4), "low": round(float(np.quantile(drawn, 0.025)), 4),
            "high": round(float(np.quantile(drawn, 0.975)), 4)}


def main() -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--state", type=Path, required=True, help="state directory of recovery.py, after --collect")
    parser.add_argument("--workload", default="html")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="parts of the names of encodings, separated by |; bf16 is always there")
    args = parser.parse_args()
    result = options.settle()
    config = override(load(values={"state_dir": str(args.state)}), {"training": {
        "time_budget_s": 0.0, "max_steps": 6 if args.quick else args.steps, "eval_every_steps": args.steps, "eval_windows": 8, "nice": 0}})
    head = target_head_of(config)
    D, champion = head.shape.hidden_size, config.engine_dir / load_engine_spec(config.engine_dir).champion
    windows = sorted((w for name in (args.workload, *OLD) for w in windows_of(config, args.state / "collected" / name, head)),
                     key=lambda w: w.window.closed_at)
    share = config.training.eval_share
    held_out = [w for w in windows if w.window.workload == args.workload and is_held_out(w.window.prompt_digest, share)]
    unseen = [w for w in windows_of(config, args.state / "unseen" / args.workload, head) + held_out if w.window.temperature == 0]
    codes = {name: layers for name, layers in encodings(windows, D).items()
             if name == "bf16" or any(part in name for part in args.only.split("|"))}
    counts: dict[str, list[Any]] = {name: [] for name in codes}
    result |= {"workload": args.workload, "steps": args.steps, "unseen_prompts": len(unseen), "encodings": {}}
    errors = {name: write_lake(config, windows, layers, args.state / "coded" / name.replace(" ", "_"), D) for name, layers in codes.items()}
    for seed in range(args.seeds):
        for name, layers in codes.items():
            counts[name].append(train(config, args.workload, args.state / "coded" / name.replace(" ", "_"), champion, seed, head, unseen))
            done = np.stack(counts[name])
            result["encodings"][name] = {"bytes_per_value": round(layers[0].bytes_per_value, 3), "relative_error": round(errors[name], 5),
                                         "acceptance_length": [round(1 + float(c[0].sum() / c[1].sum()), 4) for c in done],
                                         **lost(np.stack(counts["bf16"])[: len(done)], done)}
            print(name, json.dumps(result["encodings"][name]), flush=True)
            if args.json:
                args.json.write_text(json.dumps(result, indent=1) + "\n")
    options.finish(result, args)


if __name__ == "__main__":
    main()
