"""One training cycle: windows and a champion in, a better draft checkpoint out. Knows no bar, no Dagster and no MLflow.

Runs until its time or its steps are used up, whichever comes first, with the learning rate annealed to zero at that point.
With `time_budget_s = 0` only steps count, and a run killed at any step and resumed ends with the weights of an unkilled one.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tide_pipeline.capture.reader import WindowStates
from tide_pipeline.config import TideConfig, TrainingSettings
from tide_pipeline.contracts import DraftCheckpoint
from tide_pipeline.errors import TrainingFailed
from tide_pipeline.models.checkpoint import digest_draft, load_draft, save_draft
from tide_pipeline.models.eagle3 import Eagle3Draft
from tide_pipeline.provenance import write_json
from tide_pipeline.training.acceptance import acceptance_length, replay
from tide_pipeline.training.batches import Batch, Sampler
from tide_pipeline.training.data import TrainingSet, find_windows, read_training_set
from tide_pipeline.training.loss import LossWeights, ttt_loss
from tide_pipeline.training.optimizer import Optimizer, rate_factor
from tide_pipeline.training.progress import TrainProgress
from tide_pipeline.training.scale import channel_scale, for_raw_taps, for_scaled_taps, scaled
from tide_pipeline.training.snapshot import Counters, finish, load_run, load_snapshot, save_run, save_snapshot, write_metrics
from tide_pipeline.training.target_head import TargetHead, target_head_of
from tide_pipeline.training.vocabulary import frequent_tokens, new_draft, with_vocabulary

Report = Callable[[TrainProgress], None]
LOG_EVERY_S = 1.0


class TrainingInterrupted(TrainingFailed):
    """Stopped on request after a checkpoint: start it again with the same --out to go on."""


def train_draft(config: TideConfig, *, workload: str, out_dir: Path, champion: Path | None = None, parent: str = "",
                focus_since: float = 0.0, progress: Report = lambda _: None,
                should_stop: Callable[[], bool] = lambda: False) -> DraftCheckpoint:
    """Train a draft for `workload`, from the `champion` folder or from scratch; go on with an unfinished run in `out_dir`.

    Windows of the workload from before `focus_since` (Unix seconds) are replay, not focus.

    Raises:
        NotEnoughSignals: too few windows, with the numbers.
        EngineMismatch: windows or champion belong to another engine.
        TrainingFailed: NaN or exploding loss, or another unfinished run in `out_dir`.
        TrainingInterrupted: `should_stop` said so; a checkpoint was written.
    """
    settings = config.training
    torch.set_num_threads(settings.threads)
    progress(TrainProgress("loading", workload))
    head = target_head_of(config)
    parent = parent or (digest_draft(champion)[:12] if champion else "")
    facts = {"workload": workload, "engine_digest": head.digest, "parent": parent, "focus_since": focus_since,
             "settings": dataclasses.asdict(settings)}
    split = load_run(out_dir, facts)
    if split is None:
        split = find_windows(config, workload, head.digest, focus_since=focus_since)
        save_run(out_dir, facts, split)
    data = read_training_set(split, head)
    run = Run(config, workload, out_dir, head.to(settings.device), data, _start(champion, head, data, settings), progress, should_stop)
    run.resume()
    run.train()
    return run.finish(parent)


def _start(champion: Path | None, head: TargetHead, data: TrainingSet, settings: TrainingSettings) -> Eagle3Draft:
    """The draft to begin with."""
    torch.manual_seed(settings.seed)
    keep = settings.draft_vocab_size
    target_ids = frequent_tokens(data.train, head.shape.vocab_size, keep) if 0 < keep < head.shape.vocab_size else None
    if champion is None:
        draft = new_draft(head, target_ids)
        for_raw_taps(draft, channel_scale(data.train))                      # its random fc is meant for inputs of unit size
        return draft
    return with_vocabulary(load_draft(champion, head.shape, head.identity), head, target_ids)


class Run:
    """A cycle under way: weights, optimizer, counters."""

    def __init__(self, config: TideConfig, workload: str, folder: Path, head: TargetHead, data: TrainingSet, draft: Eagle3Draft,
                 progress: Report, should_stop: Callable[[], bool]) -> None:
        s = self.settings = config.training
        self.config, self.workload, self.folder, self.head = config, workload, folder, head
        self.scale_G = channel_scale(data.train)
        self.data = data = scaled(data, self.scale_G)
        self.draft = draft.to(s.device)
        for_scaled_taps(self.draft, self.scale_G)
        self.draft.lm_head.weight.requires_grad_(s.train_lm_head)
        self.optimizer = Optimizer(self.draft, s)
        self.sampler = Sampler(data.focus, data.replay, s.batch_windows, s.window_rows, s.replay_share, s.seed)
        self.weights = LossWeights(s.ttt_steps, s.soft_share, s.step_decay)
        self.best: dict[str, Tensor] = {}
        self.counters = Counters()
        self.report, self.should_stop = progress, should_stop
        self.losses: list[float] = []

    def resume(self) -> None:
        """Take up the snapshot in the folder; without one, evaluate the draft it starts from."""
        found = load_snapshot(self.folder)
        if found is None:
            self.evaluate()
            self.counters.start_acceptance = self.counters.last_acceptance
            return
        self.counters, groups = found
        if not groups["scale"]["taps"].equal(self.scale_G):
            raise TrainingFailed(f"windows of the run in {self.folder} are gone from the lake: remove the folder and train again")
        self.draft.load_state_dict(groups["draft"])
        self.optimizer.load(groups.get("optimizer", {}))
        self.best = groups["best"]

    def train(self) -> None:
        """Steps until the budget is used."""
        c, s = self.counters, self.settings
        started = time.monotonic() - c.elapsed_s
        evaluated = checkpointed = logged = c.elapsed_s
        rows_before, at_before = c.rows, c.elapsed_s
        self.tell("training")
        while (share := self.share()) < 1.0:
            loss = self.step(share)
            c.elapsed_s = time.monotonic() - started
            if c.elapsed_s - logged >= LOG_EVERY_S:
                rows_per_s = (c.rows - rows_before) / (c.elapsed_s - at_before)
                self.log(rows_per_s, loss)
                self.tell("training", rows_per_s)
                logged = c.elapsed_s
            if self.due(evaluated):
                self.tell("evaluating")
                self.evaluate()
                rows_before, at_before = c.rows, time.monotonic() - started
                evaluated = logged = c.elapsed_s = at_before
            stop = self.should_stop()
            if stop or c.elapsed_s - checkpointed >= s.checkpoint_every_s:
                save_snapshot(self.folder, c, {"draft": self.draft.state_dict(), "optimizer": self.optimizer.tensors(), "best": self.best,
                                               "scale": {"taps": self.scale_G}})
                checkpointed = c.elapsed_s
            if stop:
                raise TrainingInterrupted(f"stopped at step {c.step}: the same command with the same folder {self.folder} goes on")

    def step(self, share: float) -> float:
        """One batch: loss, gradient, update."""
        c, s = self.counters, self.settings
        batch = self.sampler.batch(c.step)
        with torch.autocast(self.head.embedding_VD.device.type, torch.bfloat16, enabled=s.autocast):
            loss = ttt_loss(self.draft, batch.to(s.device), self.head.embedding_VD, self.head.lm_head_VD, self.weights)
        value = loss.item()
        if c.step == 0:
            c.first_loss = value
        if not math.isfinite(value) or value > 3 * c.first_loss + 10:
            raise TrainingFailed(f"loss {value:.3g} at step {c.step} (mean so far {c.mean_loss:.3g}), in a batch of request "
                                 f"{', '.join(suspects(batch))}: delete that request from the lake, or lower training.learning_rate")
        loss.backward()  # type: ignore[no-untyped-call]
        if s.clip_norm > 0:
            torch.nn.utils.clip_grad_norm_([p for p in self.draft.parameters() if p.requires_grad], s.clip_norm)
        self.optimizer.step(rate_factor(c.step, share, s.warmup_steps))
        self.losses.append(value)
        c.mean_loss = value if c.step == 0 else 0.95 * c.mean_loss + 0.05 * value
        c.step += 1
        c.rows += batch.num_rows
        return value

    def share(self) -> float:
        """How much of the budget is used: of the time or of the steps, whichever is further."""
        c, s = self.counters, self.settings
        return max(c.step / s.max_steps, c.elapsed_s / s.time_budget_s if s.time_budget_s > 0 else 0.0)

    def due(self, evaluated_s: float) -> bool:
        """Whether to evaluate now."""
        c, s = self.counters, self.settings
        return c.step % s.eval_every_steps == 0 if s.eval_every_steps > 0 else c.elapsed_s - evaluated_s >= s.eval_every_s

    def evaluate(self) -> None:
        """Offline acceptance on the held-out windows of the workload; remembers the best weights."""
        c = self.counters
        c.last_acceptance = self.acceptance_on(self.data.focus_held_out)
        if c.best_step < 0 or c.last_acceptance > c.best_acceptance:
            c.best_acceptance, c.best_step = c.last_acceptance, c.step
            self.best = {name: tensor.detach().clone() for name, tensor in self.draft.state_dict().items()}
        c.curve.append({"step": c.step, "elapsed_s": round(c.elapsed_s, 3), "acceptance_length": c.last_acceptance})
        write_metrics(self.folder, c.curve)

    def acceptance_on(self, windows: Sequence[WindowStates]) -> float:
        """Over the newest `eval_windows` greedy windows, or sampled ones where there are no greedy ones."""
        chosen = [w for w in windows if w.window.temperature == 0] or list(windows)
        replays = replay(self.draft, self.head.embedding_VD, chosen[-self.settings.eval_windows :], self.config.gate.draft_length)
        return acceptance_length(replays)

    def log(self, rows_per_s: float, loss: float) -> None:
        """A point of the curve."""
        c = self.counters
        mean = sum(self.losses) / len(self.losses) if self.losses else loss
        self.losses.clear()
        c.curve.append({"step": c.step, "elapsed_s": round(c.elapsed_s, 3), "loss": mean, "rows_per_s": rows_per_s})

    def tell(self, stage: str, rows_per_s: float = 0.0) -> None:
        c, s, share = self.counters, self.settings, min(self.share(), 1.0)
        left = c.elapsed_s / share * (1 - share) if share > 0 else s.time_budget_s
        speed = rows_per_s or c.rows / max(c.elapsed_s, 1e-9)
        self.report(TrainProgress(stage, self.workload, c.step, share, c.mean_loss, c.last_acceptance, c.best_acceptance,
                                  c.start_acceptance, speed, left))

    def finish(self, parent: str) -> DraftCheckpoint:
        """Evaluate the last weights, keep the better of last and best, write the checkpoint folder."""
        c, s, data = self.counters, self.settings, self.data
        self.tell("evaluating")
        self.evaluate()
        self.draft.load_state_dict(self.best)
        self.tell("saving")
        replay_acceptance = self.acceptance_on(data.replay_held_out) if data.replay_held_out else 0.0
        provenance: dict[str, Any] = {
            "workload": self.workload, "parent": parent, "settings": dataclasses.asdict(s), "seed": s.seed, "steps": c.step,
            "best_step": c.best_step, "train_s": round(c.elapsed_s, 1), "windows": len(data.train), "rows": data.num_rows,
            "requests": len({w.window.request_id for w in data.train}), "prompts": len({w.window.prompt_digest for w in data.train}),
            "shards": shards(data.train), "skipped": dict(data.skipped),
            "acceptance_length": c.best_acceptance, "start_acceptance_length": c.start_acceptance,
            "replay_acceptance_length": replay_acceptance, "curve": c.curve}
        for_raw_taps(self.draft, self.scale_G)
        digest = save_draft(self.draft, self.folder, self.head.identity, provenance)
        checkpoint = DraftCheckpoint(str(self.folder), digest, self.config.target, self.head.digest, parent, c.step, round(c.elapsed_s, 1),
                                     len(data.train), data.num_rows, c.best_acceptance)
        write_json(self.folder / "checkpoint.json", dataclasses.asdict(checkpoint))
        finish(self.folder)
        self.tell("done")
        return checkpoint


def suspects(batch: Batch) -> list[str]:
    """Requests whose states are not finite; all of the batch when every one is."""
    everyone = sorted({request for row in batch.requests for request in row})
    bad = ~torch.isfinite(batch.taps_BTG).all(-1)
    if batch.teacher_BTD is not None:
        bad |= ~torch.isfinite(batch.teacher_BTD).all(-1)
    named = {batch.requests[b][int(batch.segments_BT[b, t])] for b, t in bad.nonzero().tolist() if batch.segments_BT[b, t] >= 0}
    return sorted(named) or everyone


def shards(windows: Sequence[WindowStates]) -> dict[str, list[int]]:
    """Shard uri -> rows of it that were trained on."""
    found: dict[str, list[int]] = {}
    for w in windows:
        found.setdefault(w.window.uri, []).append(w.window.row)
    return {uri: sorted(rows) for uri, rows in sorted(found.items())}
