"""What training settings must satisfy beyond their types. Knows settings alone."""

from __future__ import annotations

from tide_pipeline.config import TrainingSettings
from tide_pipeline.errors import SettingsError
from tide_pipeline.training.optimizer import OPTIMIZERS, SCHEDULES

SHARES = ("soft_share", "accept_share", "replay_share", "eval_share", "champion_share")


def check(settings: TrainingSettings, processes: int = 1) -> TrainingSettings:
    """The same settings, fit for that many processes. Raises SettingsError, naming the setting and what it may be."""
    s = settings
    _must(s.optimizer in OPTIMIZERS, "optimizer", s.optimizer, f"one of {', '.join(OPTIMIZERS)}")
    _must(s.schedule in SCHEDULES, "schedule", s.schedule, f"one of {', '.join(SCHEDULES)}")
    for name in SHARES:
        _must(0.0 <= getattr(s, name) <= 1.0, name, getattr(s, name), "from 0 to 1")
    _must(0.0 <= s.ema_decay < 1.0, "ema_decay", s.ema_decay, "from 0 to below 1")
    _must(s.reject_weight >= 0.0, "reject_weight", s.reject_weight, "0 or more")
    _must(s.cache_mb > 0.0, "cache_mb", s.cache_mb, "more than 0")
    _must(s.max_steps > 0, "max_steps", s.max_steps, "at least 1")
    _must(s.ttt_steps > 0, "ttt_steps", s.ttt_steps, "at least 1")
    _must(s.batch_windows >= processes and s.batch_windows % processes == 0, "batch_windows", s.batch_windows,
          f"a multiple of the number of processes, {processes}")
    _must(1 <= s.accumulate <= s.batch_windows, "accumulate", s.accumulate, f"from 1 to batch_windows ({s.batch_windows})")
    return settings


def _must(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise SettingsError(f"training.{name} is {value!r}: set it to {allowed}")
