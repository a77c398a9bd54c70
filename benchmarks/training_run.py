"""A training run as the benchmarks step it: everything `train_draft` does before its first step, and nothing after. Times nothing."""

from __future__ import annotations

from pathlib import Path

from tide_pipeline.config import TideConfig
from tide_pipeline.training.checks import check
from tide_pipeline.training.data import find_windows
from tide_pipeline.training.look import look_through
from tide_pipeline.training.loop import first_draft
from tide_pipeline.training.places import window_reader
from tide_pipeline.training.run import Run
from tide_pipeline.training.stream import MB
from tide_pipeline.training.target_head import target_head_of
from tide_pipeline.training.team import Team


def open_run(config: TideConfig, workload: str, folder: Path, champion: Path | None = None) -> Run:
    """Call `run.step()` as often as wanted; nothing is written."""
    settings = check(config.training, 1)
    head, reader, team = target_head_of(config), window_reader(config), Team(device=settings.device)
    look = look_through(find_windows(config, workload, head.digest), head, reader, settings.cache_mb * MB)
    draft = first_draft(champion, head, look, settings)
    return Run(config, workload, folder, head.to(team.device), look, reader, draft, team, lambda _: None, lambda: False, {})
