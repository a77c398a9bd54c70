"""A training run under way: steps, evaluations, snapshots and the folder it ends in. Knows no lake, no bar, no Dagster and no MLflow."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from safetensors.torch import save

from tide_pipeline.capture.reader import WindowStates
from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import DraftCheckpoint, SignalWindow
from tide_pipeline.errors import TrainingFailed
from tide_pipeline.models.checkpoint import save_draft
from tide_pipeline.models.eagle3 import Eagle3Draft
from tide_pipeline.provenance import digest_bytes, write_json
from tide_pipeline.training.anchor import Anchor
from tide_pipeline.training.average import Average
from tide_pipeline.training.certificate import of_windows
from tide_pipeline.training.gradient import GradientMaker, Rows, blame, divisors
from tide_pipeline.training.look import Look
from tide_pipeline.training.loss import LossWeights
from tide_pipeline.training.optimizer import Optimizer, rate_factor
from tide_pipeline.training.places import WindowReader
from tide_pipeline.training.progress import TrainProgress
from tide_pipeline.training.scale import channel_scale, for_raw_taps, for_scaled_taps, scaled
from tide_pipeline.training.selection import AVERAGED, LIVE, Selection, newest_greedy
from tide_pipeline.training.shares import Shares
from tide_pipeline.training.snapshot import (
    CHECKPOINT,
    Counters,
    finish,
    load_snapshot,
    random_states,
    read_checkpoint,
    save_snapshot,
    set_random_states,
    write_metrics,
)
from tide_pipeline.training.stream import open_stream, read_all
from tide_pipeline.training.target_head import TargetHead
from tide_pipeline.training.team import Team

Report = Callable[[TrainProgress], None]
LOG_EVERY_S = 1.0


class TrainingInterrupted(TrainingFailed):
    """Stopped on request after a checkpoint: start it again with the same --out to go on."""


class Run:
    """A cycle under way: weights, optimizer, counters."""

    def __init__(self, config: TideConfig, workload: str, folder: Path, head: TargetHead, look: Look, reader: WindowReader,
                 draft: Eagle3Draft, team: Team, progress: Report, should_stop: Callable[[], bool], origin: Mapping[str, Any]) -> None:
        s = self.settings = config.training
        self.config, self.workload, self.folder, self.head, self.team = config, workload, folder, head, team
        self.origin = origin                                   # more of where the draft comes from, for its provenance
        self.scale_G = channel_scale(look.squares_G)
        self.windows, self.reader = look.windows, reader
        self.held_out = self.mine(newest_greedy(look.windows.focus_held_out, s.eval_windows))
        self.draft = draft.to(team.device)
        for_scaled_taps(self.draft, self.scale_G)
        self.draft.lm_head.weight.requires_grad_(s.train_lm_head)
        self.shares = Shares(self.draft, team)
        self.anchor = Anchor(self.shares.trained, s.champion_share if origin.get("parent_digest") else 0.0)
        self.optimizer = Optimizer(self.shares.mine, s)
        self.average = Average(self.shares.mine, s.ema_decay)
        self.stream = open_stream(s, look, head, reader, team, self.held_out, self.scale_G)
        weights = LossWeights(s.ttt_steps, s.soft_share, s.step_decay, s.accept_share, s.reject_weight)
        self.maker = GradientMaker(self.draft, head, weights, s.window_rows, s.autocast, s.accumulate)
        self.selection = Selection(self.maker, self.average, config.gate.draft_length, self.shares)
        self.counters = Counters()
        self.report, self.should_stop = progress, should_stop
        self.losses: list[float] = []

    def mine(self, windows: Sequence[SignalWindow]) -> list[WindowStates]:
        """States of this process's share of held-out windows."""
        return [scaled(states, self.scale_G) for states in read_all(self.reader, self.team.mine(windows))]

    def resume(self) -> None:
        """Take up the snapshot in the folder; without one, evaluate the draft it starts from."""
        found = load_snapshot(self.folder)
        if found is None:
            self.evaluate()
            self.counters.start_acceptance = self.counters.last_acceptance
            return
        self.counters, groups = found
        if not groups["scale"]["taps"].equal(self.scale_G):
            raise TrainingFailed(f"the windows of the run in {self.folder} are not those it began with: remove the folder and train again")
        self.draft.load_state_dict(groups["draft"])
        self.optimizer.load(groups.get("optimizer", {}))
        self.average.load(groups.get("average", {}))
        self.selection.best, self.maker.parts = groups["best"], self.counters.parts
        set_random_states(groups["random"])

    def save(self) -> None:
        """The snapshot `resume` takes up."""
        average, optimizer = self.team.collect(self.average.held), self.team.collect(self.optimizer.tensors())
        if self.team.is_first:
            save_snapshot(self.folder, self.counters, {
                "draft": self.draft.state_dict(), "average": average, "optimizer": optimizer,
                "best": self.selection.best, "scale": {"taps": self.scale_G}, "random": random_states()})

    def train(self) -> None:
        """Steps until the budget is used, or patience is."""
        c, s = self.counters, self.settings
        started = time.monotonic() - c.elapsed_s
        evaluated = checkpointed = logged = c.elapsed_s
        rows_before, at_before = c.rows, c.elapsed_s
        self.tell("training")
        while self.share() < 1.0 and not self.out_of_patience():
            loss = self.step()
            c.elapsed_s, stop = self.team.latest(time.monotonic() - started, float(self.should_stop()))
            if c.elapsed_s - logged >= LOG_EVERY_S:
                rows_per_s = (c.rows - rows_before) / (c.elapsed_s - at_before)
                self.log(rows_per_s, loss)
                self.tell("training", rows_per_s)
                logged = c.elapsed_s
            if self.due(evaluated):
                self.tell("evaluating")
                self.evaluate()
                rows_before, at_before = c.rows, time.monotonic() - started
                evaluated = logged = c.elapsed_s = self.team.latest(at_before)[0]
            if stop or c.elapsed_s - checkpointed >= s.checkpoint_every_s:
                self.save()
                checkpointed = c.elapsed_s
            if stop:
                raise TrainingInterrupted(f"stopped at step {c.step}: the same command with the same folder {self.folder} goes on")
        self.save()

    def step(self) -> float:
        """One batch: loss, gradient, update. All processes of a team make the same update."""
        c, s = self.counters, self.settings
        rows, mine = self.stream.batch(c.step)
        loss = self.maker.run(mine, divisors(rows, mine, self.maker.weights, self.team))
        c.parts = self.maker.parts
        self.team.add_up([loss])
        value, norm = loss.item(), self.shares.sum_gradients(s.clip_norm)
        if c.step == 0:
            c.first_loss = value
        if not math.isfinite(value) or not math.isfinite(norm) or value > 3 * c.first_loss + 10:
            self.stop_at(value, norm, mine)
        self.optimizer.step(rate_factor(c.step, self.share(), s.warmup_steps, s.schedule))
        self.shares.hand_out()
        self.average.update(c.step)
        self.losses.append(value)
        c.mean_loss = value if c.step == 0 else 0.95 * c.mean_loss + 0.05 * value
        c.step += 1
        c.rows += sum(cut.rows for row in rows for cut in row)
        return value

    def stop_at(self, loss: float, norm: float, mine: Rows) -> NoReturn:
        """Say which windows made the loss or its gradient what it is; the weights have not moved."""
        c, everyones = self.counters, self.team.everyones(json.dumps(blame(self.maker, mine)))
        found = [(value, name) for text in everyones for value, name in json.loads(text)]
        bad = [name for value, name in found if not math.isfinite(value)] or [max(found)[1]]
        raise TrainingFailed(f"loss {loss:.3g}, gradient norm {norm:.3g} at step {c.step} (mean loss so far {c.mean_loss:.3g}), caused by "
                             f"{'; '.join(bad)}: delete that request from the lake and train into another folder, or lower "
                             "training.learning_rate")

    def share(self) -> float:
        """How much of the budget is used: of the time or of the steps, whichever is further."""
        c, s = self.counters, self.settings
        return max(c.step / s.max_steps, c.elapsed_s / s.time_budget_s if s.time_budget_s > 0 else 0.0)

    def due(self, evaluated_s: float) -> bool:
        """Whether to evaluate now."""
        c, s = self.counters, self.settings
        return c.step % s.eval_every_steps == 0 if s.eval_every_steps > 0 else c.elapsed_s - evaluated_s >= s.eval_every_s

    def out_of_patience(self) -> bool:
        """Whether acceptance has stopped rising."""
        return 0 < self.settings.patience <= self.counters.stale_evaluations

    def evaluate(self) -> None:
        """Offline acceptance on the held-out windows of the workload; remembers the best weights."""
        c = self.counters
        found = self.selection.measure(self.held_out, c)
        c.evaluated_step = c.step
        point = {"step": c.step, "elapsed_s": round(c.elapsed_s, 3), "acceptance_length": found[LIVE]}
        c.curve.append(point | ({"averaged_acceptance_length": found[AVERAGED]} if AVERAGED in found else {}))
        if self.team.is_first:
            write_metrics(self.folder, c.curve)

    def log(self, rows_per_s: float, loss: float) -> None:
        """A point of the curve."""
        c = self.counters
        mean = sum(self.losses) / len(self.losses) if self.losses else loss
        self.losses.clear()
        c.curve.append({"step": c.step, "elapsed_s": round(c.elapsed_s, 3), "loss": mean, "rows_per_s": rows_per_s,
                        "rate_factor": rate_factor(c.step, self.share(), self.settings.warmup_steps, self.settings.schedule)})

    def tell(self, stage: str, rows_per_s: float = 0.0) -> None:
        c, s, share = self.counters, self.settings, min(self.share(), 1.0)
        left = c.elapsed_s / share * (1 - share) if share > 0 else s.time_budget_s
        speed = rows_per_s or c.rows / max(c.elapsed_s, 1e-9)
        self.report(TrainProgress(stage, self.workload, c.step, share, c.mean_loss, c.last_acceptance, c.best_acceptance,
                                  c.start_acceptance, speed, left))

    def finish(self, parent: str) -> DraftCheckpoint:
        """Evaluate the last weights, take the better of last and best, a little back to the champion; write the checkpoint folder."""
        c, s, w = self.counters, self.settings, self.windows
        if len(set(self.team.everyones(self.fingerprint()))) > 1:
            raise TrainingFailed(f"the {self.team.size} processes hold different weights at step {c.step}, which must not happen: train "
                                 "again in another folder, with one process if it stays so")
        if c.evaluated_step != c.step:
            self.tell("evaluating")
            self.evaluate()
        self.draft.load_state_dict(self.selection.best)
        trained_acceptance = c.best_acceptance
        if self.anchor.begun:
            self.anchor.pull()
            c.best_acceptance = self.selection.acceptance_on(self.held_out)
        self.tell("saving")
        self.stream.close()
        replayed = self.mine(newest_greedy(self.reader.locate(w.replay_held_out)[0], s.eval_windows))      # those that are still there
        replay_acceptance = self.selection.acceptance_on(replayed) if w.replay_held_out else 0.0
        provenance: dict[str, Any] = {
            "workload": self.workload, "parent": parent, "settings": dataclasses.asdict(s), "seed": s.seed, "steps": c.step,
            "best_step": c.best_step, "best_weights": c.best_source, "processes": self.team.size,
            "kept_bytes": [int(text) for text in self.team.everyones(str(self.kept_bytes()))], "micro_batches": c.parts,
            "stopped_early": self.out_of_patience(), "train_s": round(c.elapsed_s, 1), **of_windows(w),
            "engine_digest": self.head.digest, **self.origin, "trained_acceptance_length": trained_acceptance,
            "acceptance_length": c.best_acceptance, "start_acceptance_length": c.start_acceptance,
            "replay_acceptance_length": replay_acceptance, "curve": c.curve}
        for_raw_taps(self.draft, self.scale_G)
        if self.team.is_first:
            self.write(parent, provenance)
        self.team.wait()
        self.tell("done")
        return read_checkpoint(self.folder)

    def kept_bytes(self) -> int:
        """Of optimizer state and averages that this process holds."""
        return sum(t.nbytes for t in (*self.optimizer.tensors().values(), *self.average.held.values()))

    def fingerprint(self) -> str:
        """Of the weights, to the last bit."""
        return digest_bytes(save({name: t.detach().cpu().contiguous() for name, t in self.draft.state_dict().items()}))

    def write(self, parent: str, provenance: dict[str, Any]) -> None:
        """The draft's folder; checkpoint.json last."""
        c, w = self.counters, self.windows
        digest = save_draft(self.draft, self.folder, self.head.identity, provenance)
        checkpoint = DraftCheckpoint(str(self.folder), digest, self.config.target, self.head.digest, parent, c.step, round(c.elapsed_s, 1),
                                     len(w.train), w.num_rows, c.best_acceptance)
        write_json(self.folder / CHECKPOINT, dataclasses.asdict(checkpoint))
        finish(self.folder)
