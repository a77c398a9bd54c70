"""The other side of peer_speculators.py: runs inside the speculators library's own environment, and imports nothing of ours.

    convert    our exported draft with their converter
    logits     of a converted draft over a captured window, at every depth of their unrolled forward
    dataset    captured windows as the data set on disk that their trainer reads
    refusals   what their trainer and its default attention say on a machine without a GPU
    train      their Trainer.train_epoch: for a time budget, or in blocks of steps that the parent asks for on stdin

Their Trainer takes a CUDA device for granted (`model.to(0)`, autocast "cuda", a timer that synchronises an accelerator), and their default
attention has no backward pass on a CPU. So `CpuTrainer` names the device and switches the timer off, and the model takes another of their
attention implementations. All else that is timed is theirs: data set, packing, collation, model, loss, optimizer, clipping.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from speculators.convert.entrypoints import convert_model
from speculators.models.eagle3 import Eagle3DraftModel
from speculators.models.eagle3.data import shift_batch
from speculators.train.data import ArrowDataset
from speculators.train.dataloader import _setup_dataloader
from speculators.train.trainer import Trainer, TrainerConfig
from torch.optim.lr_scheduler import LambdaLR
from transformers.utils import logging as transformers_logging

NEVER = 10**9
WARMUP_STEPS = 20                  # as on our side


class CpuTrainer(Trainer):
    """Their trainer where there is no accelerator."""

    def setup_trainer(self) -> None:
        super().setup_trainer()
        self.local_rank, self.device_type = "cpu", "cpu"
        self.global_step = 1                                   # step 0 would be logged, with a timer that needs an accelerator


class TimeIsUp(Exception):
    """Ends an epoch."""


def open_model(folder: Path, attention: str) -> Eagle3DraftModel:
    """In fp32, as a draft that they begin from scratch.

    A checkpoint without embeddings, as their own converter writes it, comes up with embeddings of zero under transformers 5: the NaN that
    marks them as missing does not outlive its loading. So they are asked to load the target's again.
    """
    config = Eagle3DraftModel.config_class.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = attention
    model = Eagle3DraftModel.from_pretrained(folder, config=config, dtype=torch.float32)
    model._load_verifier_weights(overwrite_embed_tokens=True)
    return model


def convert(args: argparse.Namespace) -> dict[str, Any]:
    """Their layer ids count hidden states, of which the embeddings are number 0."""
    convert_model(model=str(args.draft), verifier=str(args.target), algorithm="eagle3", output_path=str(args.out),
                  eagle_aux_hidden_state_layer_ids=[layer + 1 for layer in args.layers])
    return {}


def logits(args: argparse.Namespace) -> dict[str, Any]:
    """`data`/window-<i>.safetensors hold taps, input_ids and position_ids of [1, T, ...]; writes logits-<i> with those of each depth."""
    model, found = open_model(args.draft, args.attention).eval(), list[torch.Tensor]()
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: found.append(output.detach()[0].contiguous()))
    for i in range(args.windows):
        window = load_file(args.data / f"window-{i}.safetensors")
        found.clear()
        with torch.no_grad():
            model(hidden_states=window["taps"], input_ids=window["input_ids"], position_ids=window["position_ids"],
                  document_ids=torch.zeros_like(window["input_ids"]), ttt_steps=args.depths)
        save_file({f"depth{depth}": z for depth, z in enumerate(found)}, args.data / f"logits-{i}.safetensors")
    return {"windows": args.windows}


def dataset(args: argparse.Namespace) -> dict[str, Any]:
    """hs_<i>.safetensors lie in `data`/hidden_states already; every row but the first is trained on."""
    tokens = [load_file(args.data / "hidden_states" / f"hs_{i}.safetensors")["token_ids"].tolist() for i in range(args.windows)]
    rows = {"input_ids": tokens, "loss_mask": [[1] * len(ids) for ids in tokens], "seq_len": [len(ids) for ids in tokens]}
    made = Dataset.from_dict(rows).with_format("torch")
    made.save_to_disk(str(args.data))
    return {"windows": len(tokens)}


def refusals(args: argparse.Namespace) -> dict[str, Any]:
    """The first line of what each of them raises; "" if it worked."""
    model = open_model(args.draft, "simple_flex_attention")
    batch = {"hidden_states": torch.zeros(1, 32, model.fc.in_features), "input_ids": torch.zeros(1, 32, dtype=torch.long),
             "document_ids": torch.zeros(1, 32, dtype=torch.long), "verifier_last_hidden_states": torch.zeros(1, 32, model.hidden_size)}
    return {"default attention": first_line(lambda: model(**batch)[1].backward()),
            "trainer": first_line(lambda: Trainer(model, TrainerConfig(1e-3, 1, str(args.out)), []))}


def first_line(run: Any) -> str:
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


class TimedDataset(ArrowDataset):
    """Theirs, and how long reading took."""

    read_s = 0.0

    def __getitem__(self, index: int) -> Any:
        began = time.perf_counter()
        found = super().__getitem__(index)
        self.read_s += time.perf_counter() - began
        return found


def train(args: argparse.Namespace) -> dict[str, Any]:
    data = TimedDataset(max_len=args.length, datapath=args.data, on_missing="raise")
    model = open_model(args.draft, args.attention)
    loader = _setup_dataloader(data, args.length, model.hidden_size, num_workers=0, preprocess=shift_batch, seed=args.seed)
    keywords, _ = Eagle3DraftModel.get_trainer_kwargs(loss_fn=args.loss, loss_implementation="eager", ttt_steps=args.depths,
                                                      ttt_step_loss_decay=args.decay)
    config = TrainerConfig(lr=args.rate, muon_lr=args.muon_rate, num_epochs=NEVER, save_path=str(args.out), train_call_kwargs=keywords,
                           optimizer=args.optimizer, scheduler_type="none", log_freq=NEVER)
    trainer = CpuTrainer(model, config, loader)
    steps = Steps(model, args)
    trainer.schedulers = [LambdaLR(part, steps.factor) for part in trainer.optimizers]
    steps.begin()
    try:
        for epoch in itertools.count():
            trainer.train_epoch(epoch, step_callback=steps.after)
    except TimeIsUp:
        pass
    spent = steps.busy_s if args.blocks else time.monotonic() - steps.began
    model.save_pretrained(args.out)
    return {"steps": steps.done, "rows": steps.rows, "padded_rows": steps.padded, "train_s": round(spent, 2),
            "read_s": round(data.read_s, 2)}


class Steps:
    """Counts, and decides after each step whether there is another one."""

    def __init__(self, model: Eagle3DraftModel, args: argparse.Namespace) -> None:
        self.args, self.done, self.rows, self.padded, self.left, self.busy_s = args, 0, 0, 0, 0, 0.0
        model.register_forward_pre_hook(self.count, with_kwargs=True)

    def begin(self) -> None:
        torch.manual_seed(self.args.seed)
        if self.args.blocks:
            self.wait()
        self.began = time.monotonic()

    def count(self, _module: Any, _inputs: Any, keywords: dict[str, Any]) -> None:
        self.rows += int((keywords["document_ids"] >= 0).sum())
        self.padded += int((keywords["document_ids"] < 0).sum())

    def factor(self, step: int) -> float:
        """Of the learning rate: the same warm-up as ours, then linear to zero at the end of the time."""
        share = 0.0 if self.args.blocks or not self.done else (time.monotonic() - self.began) / self.args.seconds
        return min(1.0, (step + 1) / WARMUP_STEPS) * max(0.0, 1.0 - share)

    def after(self) -> None:
        self.done += 1
        if not self.args.blocks:
            if time.monotonic() - self.began >= self.args.seconds:
                raise TimeIsUp
            return
        self.left -= 1
        if self.left == 0:
            self.busy_s += time.perf_counter() - self.at[0]
            print(json.dumps({"wall_s": time.perf_counter() - self.at[0], "cpu_s": time.thread_time() - self.at[1],
                              "units": self.rows - self.at[2]}), file=self.args.answers, flush=True)
            self.wait()

    def wait(self) -> None:
        line = sys.stdin.readline().strip()
        if not line:
            raise TimeIsUp
        self.left, self.at = int(line), (time.perf_counter(), time.thread_time(), self.rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["convert", "logits", "dataset", "refusals", "train"])
    for name in ("draft", "target", "out", "data"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--layers", type=int, nargs="+")
    parser.add_argument("--windows", type=int)
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--depths", type=int, default=3)
    parser.add_argument("--decay", type=float, default=1.0)
    parser.add_argument("--loss", default="kl_div")
    parser.add_argument("--optimizer", default="muon")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--muon-rate", type=float, default=1e-3)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--blocks", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    args.answers, sys.stdout = sys.stdout, sys.stderr          # theirs print; answers are lines of JSON
    print(json.dumps(globals()[args.do](args)), file=args.answers, flush=True)


if __name__ == "__main__":
    main()
