"""tide sql | report: what the signal lake says."""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from tide_pipeline.cli.app import LOOK, JsonFlag, app, console, print_json, print_table, settings_of
from tide_pipeline.errors import InvalidRequest


@app.command(rich_help_panel=LOOK)
def sql(
    ctx: typer.Context,
    query: Annotated[str, typer.Argument(metavar="SELECT", help="One statement that only reads.")],
    as_json: JsonFlag = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV with a header line.")] = False,
    with_text: Annotated[bool, typer.Option("--with-text", help="Add the columns of signals that are prompt text.")] = False,
) -> None:
    """Ask the lake in SQL. Views: acceptance, requests, drafts, signals, skipped.

    [bold]tide sql "select draft_version, acceptance_length from drafts"[/bold]
    """
    from tide_pipeline.drift.views import query as ask

    if as_json and as_csv:
        raise InvalidRequest("--json or --csv, not both")
    columns, rows = ask(settings_of(ctx), query, with_text=with_text)
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
    elif as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
    else:
        print_table(columns, rows)


@app.command(rich_help_panel=LOOK)
def report(
    ctx: typer.Context,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: reports/report.html in the state directory.")] = None,
    hours: Annotated[float, typer.Option(min=0.01, help="How far back it looks.")] = 24.0,
    with_savings: Annotated[bool, typer.Option("--savings/--no-savings", help="Say what drafts saved; replays captured windows.")] = True,
) -> None:
    """Write a self-contained HTML page: what drafts saved, acceptance and throughput over time, drift, trainings, gates, deployments.

    [bold]tide report --hours 1 --out now.html[/bold]
    """
    from tide_pipeline.report.page import write_report
    from tide_pipeline.report.period import collect

    config = settings_of(ctx)
    file = out or config.state.reports / "report.html"
    write_report(file, collect(config, time.time() - 3600 * hours, with_savings=with_savings))
    console().print(str(file), markup=False)
