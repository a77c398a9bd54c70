"""How a run is told about: a bar for a terminal, lines for a log, a file for other viewers. Knows no tensors."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tide_pipeline.provenance import write_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID


@dataclasses.dataclass(frozen=True, slots=True)
class TrainProgress:
    """Where a training run stands."""

    stage: str                     # loading, training, evaluating, saving, done
    workload: str
    step: int = 0
    share: float = 0.0             # of the budget, 0 .. 1
    loss: float = 0.0              # exponential mean over about 20 steps
    acceptance: float = 0.0        # offline acceptance length on held-out requests; 0 before the first evaluation
    best_acceptance: float = 0.0
    start_acceptance: float = 0.0  # of the draft it started from
    rows_per_s: float = 0.0        # tokens trained on, one row each
    time_left_s: float = 0.0       # of the budget, or estimated from the steps

    @property
    def text(self) -> str:
        """One line for people."""
        return f"{self.stage}: {self.facts}"

    @property
    def facts(self) -> str:
        """The line without its stage."""
        return (f"step {self.step}, loss {self.loss:.3f}, acceptance {self.acceptance:.2f} (started at {self.start_acceptance:.2f}, "
                f"best {self.best_acceptance:.2f}), {self.rows_per_s:,.0f} tokens/s, {self.time_left_s:.0f} s left")


class Viewer(Protocol):
    """Something that shows progress. Called several times a second; must be quick."""

    def show(self, progress: TrainProgress) -> None: ...

    def close(self) -> None: ...


class BarViewer:
    """A live bar, for a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.progress import BarColumn, Progress, TextColumn  # training itself runs where there is no rich

        self.bar = Progress(TextColumn("{task.description:<10}"), BarColumn(20), TextColumn("{task.percentage:>3.0f}%"),
                            TextColumn("{task.fields[facts]}"), console=console)
        self.task: TaskID | None = None

    def show(self, progress: TrainProgress) -> None:
        if self.task is None:
            self.bar.start()
            self.task = self.bar.add_task("loading", total=1.0, facts="")
        self.bar.update(self.task, description=progress.stage, completed=progress.share, facts=progress.facts)

    def close(self) -> None:
        self.bar.stop()


class Pace:
    """Due at each change of stage, and every few seconds within one."""

    def __init__(self, every_s: float) -> None:
        self._every_s, self._last, self._stage = every_s, 0.0, ""

    def is_due(self, stage: str) -> bool:
        now = time.monotonic()
        if stage == self._stage and now - self._last < self._every_s:
            return False
        self._last, self._stage = now, stage
        return True


class LineViewer:
    """A line at each change of stage, and every few seconds."""

    def __init__(self, say: Callable[[str], None], every_s: float = 5.0) -> None:
        self.say, self._pace = say, Pace(every_s)

    def show(self, progress: TrainProgress) -> None:
        if self._pace.is_due(progress.stage):
            self.say(progress.text)

    def close(self) -> None: ...


class FileViewer:
    """`progress.json`, whole at any moment, rewritten once a second and at each change of stage."""

    def __init__(self, path: Path, every_s: float = 1.0) -> None:
        self.path, self._pace = path, Pace(every_s)

    def show(self, progress: TrainProgress) -> None:
        if self._pace.is_due(progress.stage):
            write_json(self.path, {**dataclasses.asdict(progress), "at": time.time()})

    def close(self) -> None: ...


class LastViewer:
    """Keeps the latest progress."""

    def __init__(self) -> None:
        self.progress = TrainProgress("loading", "")

    def show(self, progress: TrainProgress) -> None:
        self.progress = progress

    def close(self) -> None: ...
