"""The terminal view of a running loop (rich): what is served, how well, and what the pipeline is doing. Draws only."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

STAGES = ("traffic", "drift", "collect", "train", "register", "build", "gate", "roll out", "measure")
BARS = "▁▂▃▄▅▆▇█"


@dataclass
class ViewState:
    """What the view shows; the demo writes it, the view reads it."""

    phase: str = "starting"
    stage: str = ""
    share: float | None = None                 # of the running stage, None when unknown
    detail: str = ""
    draft_version: str = "-"
    acceptance_length: float = 0.0
    first_position_rate: float = 0.0
    tokens_per_s: float = 0.0
    in_flight: int = 0
    failed: int = 0
    collected_rows: int = 0
    drift: str = ""
    done: list[tuple[str, float]] = field(default_factory=list)         # stage, seconds
    acceptance: deque[float] = field(default_factory=lambda: deque(maxlen=72))
    throughput: deque[float] = field(default_factory=lambda: deque(maxlen=72))
    elapsed_s: float = 0.0

    def sample(self) -> None:
        """Add the present figures to the two curves."""
        self.acceptance.append(self.acceptance_length)
        self.throughput.append(self.tokens_per_s)


def spark(values: Sequence[float], low: float, high: float) -> str:
    """One character a value, between low and high."""
    span = max(high - low, 1e-9)
    return "".join(BARS[min(len(BARS) - 1, max(0, int((v - low) / span * len(BARS))))] for v in values)


def render(state: ViewState) -> RenderableType:
    """The whole view."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="right", style="dim")
    grid.add_column()
    grid.add_row("phase", Text(state.phase, style="bold"))
    grid.add_row("draft", f"{state.draft_version}   {state.in_flight} in flight, {state.failed} failed")
    grid.add_row("acceptance length", Text.assemble((f"{state.acceptance_length:5.2f} ", "bold green"),
                                                    (spark(state.acceptance, 1.0, 4.5), "green"),
                                                    f"  first position {state.first_position_rate:.2f}"))
    top = max([*state.throughput, 1.0])
    grid.add_row("tokens/s", Text.assemble((f"{state.tokens_per_s:5.0f} ", "bold cyan"), (spark(state.throughput, 0.0, top), "cyan")))
    grid.add_row("collected", f"{state.collected_rows:,} token rows")
    grid.add_row("drift", Text(state.drift or "-", overflow="ellipsis", no_wrap=True))
    done = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in state.done)
    running = Table.grid(padding=(0, 1))
    running.add_row(Text(state.stage or "-", style="bold yellow"),
                    ProgressBar(total=1.0, completed=state.share, width=30) if state.share is not None else Text(""),
                    Text(state.detail, overflow="ellipsis", no_wrap=True))
    grid.add_row("stage", running)
    return Panel(Group(grid, Text(f"done: {done}" if done else "", style="dim")), title="tide", subtitle=f"{state.elapsed_s:.0f} s")
