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

HOURS = 24.0                       # that a report looks back where nothing is said


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
    hours: Annotated[float | None, typer.Option(min=0.01, help="How far back it looks from now; 24 without any of the three.")] = None,
    since: Annotated[str | None, typer.Option(metavar="AGO|TIME", help="Where the period begins: 30m, 12h, 7d, or 2026-02-07T09:00 (UTC). "
                                              "Without it 24 hours before its end.")] = None,
    until: Annotated[str | None, typer.Option(metavar="AGO|TIME", help="Where it ends, in the same forms; without it now.")] = None,
    with_savings: Annotated[bool, typer.Option("--savings/--no-savings", help="Say what drafts saved; replays captured windows.")] = True,
) -> None:
    """Write a self-contained HTML page: what drafts saved, acceptance and throughput over time, drift, trainings, gates, deployments.

    [bold]tide report --hours 1 --out now.html[/bold]

    [bold]tide report --since 30d[/bold]

    [bold]tide report --since 2026-11-20T09:00 --until 2026-11-20T12:00 --out incident.html[/bold]
    """
    from tide_pipeline.report.page import write_report
    from tide_pipeline.report.period import collect

    config, (begin, end) = settings_of(ctx), _period(hours, since, until, time.time())
    file = out or config.state.reports / "report.html"
    write_report(file, collect(config, begin, end, with_savings=with_savings))
    console().print(str(file), markup=False)


def _period(hours: float | None, since: str | None, until: str | None, now: float) -> tuple[float, float]:
    """Unix seconds; never past now. Raises InvalidRequest."""
    from tide_pipeline.cli.drift import moment

    if hours is not None and (since is not None or until is not None):
        raise InvalidRequest("--hours looks back from now: leave it out beside --since and --until, or say it alone")
    end = min(now, moment(until, now, "--until")) if until is not None else now
    begin = moment(since, now) if since is not None else end - 3600 * (hours or HOURS)
    if begin >= now:
        raise InvalidRequest(f"--since {since} (UTC) is in the future: is it local time? Add its offset, such as +01:00")
    if begin >= end:
        raise InvalidRequest(f"--since {since} is not before --until {until}: exchange them, or leave one out")
    return begin, end
