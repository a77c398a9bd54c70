"""What a demo run came to: the table, the JSON and the report page. Starts and measures nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import DriftVerdict
from tide_pipeline.report.page import write_report
from tide_pipeline.report.period import collect
from tide_pipeline.stack.measure import PhaseMeasurement
from tide_pipeline.stack.runs import RunView


@dataclass(frozen=True)
class DemoOutcome:
    """Everything the demo found."""

    config: TideConfig
    phases: list[PhaseMeasurement]
    failed_requests: int
    collected_tokens: int
    stages_s: dict[str, float]
    verdict: DriftVerdict | None
    run: RunView | None
    marks: list[tuple[float, str]]
    began: float
    urls: dict[str, str]

    @property
    def closed(self) -> bool:
        """The run succeeded, its draft is live, nobody was turned away, and acceptance is above that of the stale draft."""
        by_name = {p.name: p.headline() for p in self.phases}
        return (self.run is not None and self.run.status == "SUCCESS" and self.failed_requests == 0
                and by_name["adapted"].acceptance_length > by_name["shifted"].acceptance_length)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {"closed": self.closed, "failed_requests": self.failed_requests, "collected_tokens": self.collected_tokens,
                "phases": [p.as_dict() for p in self.phases],
                "adaptation_s": {stage: round(seconds, 1) for stage, seconds in self.stages_s.items()},
                "drift": asdict(self.verdict) if self.verdict else None, "run_id": self.run.run_id if self.run else None,
                "marks": [{"time": at, "label": label} for at, label in self.marks], "urls": self.urls}


def print_outcome(outcome: DemoOutcome, console: Console, report: Path) -> None:
    """The table of phases, then seconds by stage and where the report is."""
    table = Table(title="what speculation is worth (one request at a time, against no speculation in the same run)")
    for column in ("phase", "text", "prompts", "acceptance length", "tokens/s", "without", "adaptive", "95 %", "fixed 3"):
        table.add_column(column, justify="left" if column in ("phase", "text") else "right")
    for phase in outcome.phases:
        for split in phase.splits():
            head = split.name == phase.headline().name
            table.add_row(phase.name if head else "", split.name, str(split.speedup.n), f"{split.acceptance_length:.2f}",
                          f"{split.tokens_per_s:.0f}", f"{split.plain_tokens_per_s:.0f}", f"{split.speedup.median:.2f}x",
                          f"{split.speedup.low:.2f} - {split.speedup.high:.2f}", f"{split.speedup_fixed.median:.2f}x",
                          style="bold" if head else "dim")
        table.add_section()
    console.print(table)
    stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in outcome.stages_s.items())
    console.print(f"adaptation: {stages}; {outcome.collected_tokens:,} token rows collected, {outcome.failed_requests} failed requests")
    console.print(f"report: {report}", soft_wrap=True)
    console.print("[bold green]the loop closed[/bold green]" if outcome.closed else "[red]the loop did not close[/red]")


def report_of(outcome: DemoOutcome, path: Path) -> None:
    """The page of this run: the lake's period with the measured phases on top."""
    data = collect(outcome.config, outcome.began)
    write_report(path, replace(data, phases=[p.as_dict() for p in outcome.phases], marks=outcome.marks, stages_s=outcome.stages_s,
                               verdicts=[outcome.verdict] if outcome.verdict else data.verdicts))
