"""tide top: replicas, versions, acceptance and the stage of the rollout, drawn again every second."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from tide_pipeline.cli.app import LOOK, JsonFlag, app, console, print_json, settings_of
from tide_pipeline.cli.rollout import headlines, print_overview, replica_table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tide_pipeline.rollout.overview import Overview


@app.command(rich_help_panel=LOOK)
def top(
    ctx: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="Print it once and end, for scripts.")] = False,
    every: Annotated[float, typer.Option(metavar="SECONDS", help="How often it is drawn.", min=0.2)] = 1.0,
    as_json: JsonFlag = False,
) -> None:
    """Live: replicas, draft versions, acceptance, tokens/s, and what the rollout does next. Ctrl-C ends it.

    [bold]tide top[/bold]   [bold]tide top --once --json | jq '.replicas[].versions'[/bold]
    """
    from tide_pipeline.rollout.overview import Onlooker

    onlooker = Onlooker(settings_of(ctx))
    if as_json:
        print_json(onlooker.look())
    elif once:
        print_overview(onlooker.look())
    else:
        _redraw(onlooker.look, every)


def _redraw(look: Callable[[], Overview], every: float) -> None:
    from rich.live import Live

    try:
        with Live(_panel(look()), console=console(), screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(every)
                live.update(_panel(look()), refresh=True)
    except KeyboardInterrupt:
        pass


def _panel(seen: Overview) -> RenderableType:
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    columns, rows = replica_table(seen)
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(str(cell) for cell in row), style="red" if row[-1].startswith(("silent", "failing")) else "")
    return Panel(Group(*(Text(line) for line in headlines(seen)), Text(), table), title="tide top", subtitle=time.strftime("%H:%M:%S"))
