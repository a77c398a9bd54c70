"""tide doctor: what is wrong here, and what to do about it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tide_pipeline.cli.app import LOOK, JsonFlag, app, console, print_json, print_table, settings_of

if TYPE_CHECKING:
    from tide_pipeline.stack.doctor.finding import Finding

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@app.command(rich_help_panel=LOOK)
def doctor(
    ctx: typer.Context,
    trtllm_source: Annotated[Path | None, typer.Option(
        "--trtllm-source", metavar="DIR", exists=True, file_okay=False,
        help="Check this TensorRT-LLM, not the installed one: a checkout of NVIDIA/TensorRT-LLM, site-packages, or the package.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Look for what will not work here, and say what to do about it.

    This machine against the settings: driver and GPUs, Triton, cores and threads, shared memory, limits, clock, room and speed of the disk
    and of the line to the lake, ports. It writes and removes one small file.

    TensorRT-LLM: its files are parsed, never imported, and every class, field, default, signature and row layout that we rely on is
    looked for: the public ones (a missing one stops the adapter) and the private ones that capture uses (a missing one stops capture).

    Exit code 1 when something failed; a warning is no failure.

    [bold]tide doctor --trtllm-source /src/TensorRT-LLM[/bold]
    """
    from tide_pipeline.stack.doctor.checks import Asked, examine
    from tide_pipeline.stack.doctor.finding import exit_code

    findings = list(examine(Asked(trtllm_source, settings_of(ctx))))
    print_json(findings) if as_json else _tell(findings)
    raise typer.Exit(exit_code(findings))


def _tell(findings: list[Finding]) -> None:
    from tide_pipeline.stack.doctor.finding import summary

    print_table(("", "looked at", "found", "next"), [(f"[{COLOURS[f.state]}]{f.state}[/]", _plain(f.name), _plain(f.found), _plain(f.todo))
                                                     for f in findings])
    console().print(summary(findings), markup=False)


def _plain(text: str) -> str:
    """Brackets of a message are not markup."""
    return text.replace("[", r"\[")
