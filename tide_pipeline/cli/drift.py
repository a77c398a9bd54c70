"""tide drift [backtest]: has acceptance fallen, and what other rules would have said."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from pathlib import Path
from typing import Annotated

import typer

from tide_pipeline.cli.app import STAGES, JsonFlag, app, console, print_json, print_table, settings_of
from tide_pipeline.config import DRIFT_POLICIES
from tide_pipeline.errors import InvalidRequest

drift = typer.Typer(invoke_without_command=True, rich_markup_mode="rich")
app.add_typer(drift, name="drift", rich_help_panel=STAGES)

_UNITS_S = {"m": 60.0, "h": 3600.0, "d": 86_400.0}


@drift.callback()
def now(ctx: typer.Context, as_json: JsonFlag = False) -> None:
    """Judge now whether acceptance has fallen, workload by workload. Launches nothing: the sensor does.

    [bold]tide drift --set drift.recent_s=20[/bold]
    """
    if ctx.invoked_subcommand is not None:
        return
    from tide_pipeline.drift.judge import judge_drift

    config = settings_of(ctx)
    verdicts = judge_drift(config)
    if as_json:
        print_json(verdicts)
    elif not verdicts:
        console().print(f"no request of {config.target} was answered in the last {config.drift.recent_s:.0f} s: nothing to judge")
    else:
        print_table(("workload", "drifted", "draft", "why"),
                    [(v.workload, "yes" if v.drifted else "no", v.draft_version, v.reason) for v in verdicts])


@drift.command()
def backtest(
    ctx: typer.Context,
    since: Annotated[str, typer.Option(metavar="AGO|TIME", help="30m, 12h, 7d, or 2026-02-07T09:00 (UTC).")] = "24h",
    policy: Annotated[list[str] | None, typer.Option(help=f"{', '.join(DRIFT_POLICIES)}; default: all.")] = None,
    slot_s: Annotated[float, typer.Option(min=0.1, help="Traffic is put together over so many seconds.")] = 5.0,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: reports/backtest.html in the state directory.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Replay recorded acceptance: when would each policy have fired, what would it have cost and gained? Writes a page with a plot.

    [bold]tide drift backtest --since 7d --policy judge --policy paper --set drift.min_drop=0.05[/bold]
    """
    from tide_pipeline.drift.backtest import backtest as run
    from tide_pipeline.drift.policies import POLICIES
    from tide_pipeline.drift.worth import Price
    from tide_pipeline.report.backtest import COLUMNS, row, write_backtest

    config, until = settings_of(ctx), time.time()
    found = run(config, policy or list(POLICIES), moment(since, until), until, slot_s)
    file = out or config.state.reports / "backtest.html"
    write_backtest(file, found, Price.of(config))
    if as_json:
        print_json([dataclasses.asdict(outcome) | {"net_tokens": outcome.net_tokens} for outcome in found.outcomes])
    else:
        print_table(COLUMNS, [row(outcome) for outcome in found.outcomes])
        console().print(str(file), markup=False)


def moment(text: str, now: float, option: str = "--since") -> float:
    """Unix seconds of `12h` ago or of a time in ISO 8601, UTC where it has no offset. Raises InvalidRequest."""
    from tide_pipeline.training.span import Span

    with contextlib.suppress(ValueError, InvalidRequest):
        found = now - float(text[:-1]) * _UNITS_S[text[-1]] if text[-1:] in _UNITS_S else Span.of("", text).until
        if math.isfinite(found):
            return found
    raise InvalidRequest(f"{option} {text}: expected 30m, 12h, 7d or a time such as 2026-02-07T09:00 (UTC)")
