"""Training as a process of its own: `python -m tide_pipeline.training --workload de --out DIR`. The only place that knows Dagster Pipes.

Exit codes: 0 trained, 1 failed with a message, 2 bad usage; run it again to go on: 75 the lake's storage does not answer, 130 stopped by a
signal after a checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from tide_pipeline import recipes
from tide_pipeline.config import TideConfig, TrainingSettings, override
from tide_pipeline.contracts import DraftCheckpoint, to_json
from tide_pipeline.errors import LakeAway, TideError
from tide_pipeline.training.checks import check
from tide_pipeline.training.launch import AWAY, STOPPED, is_launched, launch
from tide_pipeline.training.loop import TrainingInterrupted, train_draft
from tide_pipeline.training.progress import BarViewer, FileViewer, LastViewer, LineViewer, TrainProgress, Viewer
from tide_pipeline.training.span import Span
from tide_pipeline.training.team import Team, team_of_environment

PR_SET_PDEATHSIG = 1


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        config = _config(args)
        settings = config.training
        if len(settings.train_devices) > 1 and not is_launched():
            check(settings, len(settings.train_devices))
            return launch(len(settings.train_devices), sys.argv[1:] if argv is None else argv)
        stop = _Stop()
        _take_share(settings)
        team = team_of_environment(settings.train_devices, settings.device)
        try:
            checkpoint = _train(args, config, team, stop)
        finally:
            team.close()
    except TrainingInterrupted as stopped:
        _complain(str(stopped))
        return STOPPED
    except TideError as error:
        _complain(f"{type(error).__name__}: {error}")
        return AWAY if isinstance(error, LakeAway) else 1
    if not team.is_first:
        return 0
    print(to_json(checkpoint) if args.json else f"draft {checkpoint.digest[:12]} in {checkpoint.path}: acceptance length "  # noqa: T201
          f"{checkpoint.acceptance_length:.2f} after {checkpoint.steps} steps, {checkpoint.train_s:.0f} s")
    return 0


def _train(args: argparse.Namespace, config: TideConfig, team: Team, stop: _Stop) -> DraftCheckpoint:
    """The run, told about on the screen and to Dagster; by the first process of a team only."""
    with _pipes() if team.is_first else contextlib.nullcontext() as pipes:
        last = LastViewer()
        viewers = [*_viewers(args, pipes), last] if team.is_first else []
        try:
            checkpoint = train_draft(config, workload=args.workload, out_dir=args.out, champion=args.champion, parent=args.parent,
                                     focus_since=args.focus_since, span=Span.of(args.since, args.until),
                                     progress=lambda p: _show(viewers, p),
                                     should_stop=lambda: stop.asked, team=team)
        finally:
            for viewer in viewers:
                viewer.close()
        if pipes is not None:
            pipes.report_asset_materialization(metadata=_metadata(checkpoint, last.progress))
        return checkpoint


def _complain(text: str) -> None:
    rank = os.environ.get("RANK", "0")
    print(f"[process {rank}] {text}" if rank != "0" else text, file=sys.stderr)  # noqa: T201


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tide_pipeline.training", description="Train a draft from captured windows.")
    parser.add_argument("--workload", required=True, help="the drifted workload")
    parser.add_argument("--out", required=True, type=Path, help="folder of the new draft; an unfinished run in it is gone on with")
    parser.add_argument("--champion", type=Path, help="draft folder to start from (default: from scratch)")
    parser.add_argument("--parent", default="", help="the champion's version, for the lineage")
    parser.add_argument("--focus-since", type=float, default=0.0,
                        help="Unix seconds: earlier windows of the workload are replayed, not adapted to (default: all are new)")
    parser.add_argument("--since", default="", metavar="TIME",
                        help="train on nothing that was captured before, such as 2026-11-20T09:00 (UTC)")
    parser.add_argument("--until", default="", metavar="TIME", help="train on nothing that was captured then or later")
    parser.add_argument("--config", type=Path, help="TOML settings (default: TIDE_CONFIG, else the recipe pocket_cpu)")
    parser.add_argument("--time-budget-s", type=float, help="overrides training.time_budget_s")
    parser.add_argument("--seed", type=int, help="overrides training.seed")
    parser.add_argument("--json", action="store_true", help="print the checkpoint record as JSON on stdout; progress goes to stderr")
    return parser


def _config(args: argparse.Namespace) -> TideConfig:
    config = recipes.load(file=args.config) if args.config else recipes.from_environment()
    given = {"time_budget_s": args.time_budget_s, "seed": args.seed}
    return override(config, {"training": {name: value for name, value in given.items() if value is not None}})


class _Stop:
    """Remembers that SIGINT, SIGTERM or the parent's death asked to stop."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)
        parent = os.getppid()
        with contextlib.suppress(OSError, AttributeError):              # Linux only: die with the parent, after a checkpoint
            ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            self.asked = True                                           # it died before we asked

    def _ask(self, *_: object) -> None:
        self.asked = True


def _take_share(settings: TrainingSettings) -> None:
    """Be polite: serving comes first on shared cores."""
    with contextlib.suppress(OSError):
        os.nice(settings.nice)


@contextlib.contextmanager
def _pipes() -> Iterator[Any]:
    """The Pipes context when Dagster started this process, else None."""
    try:
        import dagster_pipes
    except ImportError:
        yield None
        return
    if not dagster_pipes.PipesEnvVarParamsLoader().is_dagster_pipes_process():  # type: ignore[no-untyped-call]
        yield None
        return
    with dagster_pipes.open_dagster_pipes() as context:
        yield context


def _viewers(args: argparse.Namespace, pipes: Any) -> list[Viewer]:
    console = Console(stderr=args.json)
    if pipes is not None:
        screen: Viewer = LineViewer(pipes.log.info)
    elif console.is_terminal:
        screen = BarViewer(console)
    else:
        screen = LineViewer(lambda line: print(line, file=console.file, flush=True))
    return [FileViewer(args.out / "progress.json"), screen]


def _show(viewers: list[Viewer], progress: TrainProgress) -> None:
    for viewer in viewers:
        viewer.show(progress)


def _metadata(checkpoint: DraftCheckpoint, last: TrainProgress) -> dict[str, Any]:
    """Plain numbers, which Dagster plots over time."""
    return {"acceptance_length": checkpoint.acceptance_length, "start_acceptance_length": last.start_acceptance, "loss": last.loss,
            "tokens_per_s": last.rows_per_s, "train_s": checkpoint.train_s, "steps": checkpoint.steps,
            "steps_per_s": checkpoint.steps / max(checkpoint.train_s, 1e-9),
            "windows": checkpoint.num_windows, "rows": checkpoint.num_rows,
            "digest": checkpoint.digest, "path": checkpoint.path, "parent": checkpoint.parent}


if __name__ == "__main__":
    raise SystemExit(main())
