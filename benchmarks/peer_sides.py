"""Both sides of peer_speculators.py: their process, and the same windows and starting draft in either format. Times nothing."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from training_run import open_run

from tide_pipeline.capture.reader import WindowStates, read_states
from tide_pipeline.config import TideConfig
from tide_pipeline.gate.offline import paired_acceptance
from tide_pipeline.models.checkpoint import load_draft, save_draft
from tide_pipeline.models.eagle3 import Eagle3Draft
from tide_pipeline.models.weights import read_weights
from tide_pipeline.training.acceptance import acceptance_length, replay
from tide_pipeline.training.batches import whole
from tide_pipeline.training.run import Run
from tide_pipeline.training.scale import for_raw_taps
from tide_pipeline.training.unroll import Unroll

WORKER = Path(__file__).with_name("peer_speculators_worker.py")
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
            states = torch.cat((taps_T3D, before_norm(w.final_TD, norm_D).unsqueeze(1)), dim=1)
            save_file({"hidden_states": states.contiguous(), "token_ids": w.token_ids[:-1].contiguous()}, folder / f"hs_{i}.safetensors")
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


def before_norm(final_TD: Tensor, norm_D: Tensor) -> Tensor:
    """States whose RMS norm with these weights is `final`, bf16: their size is lost, which the norm ignores."""
    return (final_TD.float() / norm_D).bfloat16()


@torch.no_grad()
def unrolled_logits(draft: Eagle3Draft, embedding_VD: Tensor, window: WindowStates, depths: int) -> list[Tensor]:
    batch = whole([window])
    unroll = Unroll(draft, embedding_VD, batch.taps_BTG, batch.positions_BT, batch.segments_BT)
    return [draft.lm_head(draft.norm(unroll.step(batch.next_ids_BT)))[0] for _ in range(depths)]
