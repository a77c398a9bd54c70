"""tide demo | up | down | status | config: the whole stack."""

from __future__ import annotations

import dataclasses
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tide_pipeline.cli.app import STACK, JsonFlag, app, console, orderly, print_json, print_table, settings_of

if TYPE_CHECKING:
    from tide_pipeline.config import TideConfig
    from tide_pipeline.stack.local import LocalStack


class Budget(StrEnum):
    FULL = "full"
    SHORT = "short"


@app.command(rich_help_panel=STACK)
def demo(
    ctx: typer.Context,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the measured figures there.")] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Where report.html goes (default: in the state directory).")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the stack up afterwards.")] = False,
    budget: Annotated[Budget, typer.Option(help="short: less training and fewer prompts, as in the end-to-end test.")] = Budget.FULL,
) -> None:
    """Play the whole loop once: good acceptance, a shift, adaptation, recovery.

    Exit code 1 when the loop did not close; the stage is named.

    [bold]tide demo --json figures.json --keep[/bold]
    """
    from tide_pipeline.stack.demo import DemoPlan, run_demo

    short = budget is Budget.SHORT
    config = settings_of(ctx, fresh=True, recipe="pocket_ci" if short else "pocket_demo")
    with orderly():
        plan = DemoPlan.short() if short else DemoPlan()
        raise typer.Exit(run_demo(config, plan=plan, json_file=json_file, report_file=report, keep=keep))


@app.command(rich_help_panel=STACK)
def up(
    ctx: typer.Context,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay, and stop everything on Ctrl-C or SIGTERM.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Start Triton with the engine, MLflow and Dagster; print where they are.

    Ports are free ones unless the settings name them. Stop it with [bold]tide down[/bold].

    [bold]tide up --set stack.dagster_port=3000 --set drift.recent_s=30[/bold]
    """
    from tide_pipeline.stack.local import LocalStack

    config, screen = settings_of(ctx, fresh=True), console(err=as_json)
    with orderly():
        stack = LocalStack.up(config, say=lambda line: screen.print(line, markup=False), bound=foreground)
        if as_json:
            print_json({**_stack_facts(stack), "launch": stack.launch_line()})
        else:
            _print_stack(stack)
        if foreground:
            _stay(stack)


@app.command(rich_help_panel=STACK)
def down(ctx: typer.Context) -> None:
    """Stop the stack; no process stays behind.

    [bold]tide down --state /data/tide[/bold]
    """
    from tide_pipeline.stack.local import down as stop_stack

    state = settings_of(ctx).state
    killed = stop_stack(state)
    console().print(f"the stack in {state.root} is down" + (f"; had to be killed: {'; '.join(killed)}" if killed else ""), markup=False)


@app.command(rich_help_panel=STACK)
def status(ctx: typer.Context, as_json: JsonFlag = False) -> None:
    """What is up, what each replica serves, how well, and whether acceptance has fallen.

    [bold]tide status --json | jq .drift[/bold]
    """
    from tide_pipeline.deployment.record import DeploymentRecord, read_observed
    from tide_pipeline.drift.judge import judge_drift
    from tide_pipeline.drift.series import live
    from tide_pipeline.stack import record

    config = settings_of(ctx)
    found = record.load(config.state)
    facts = {
        "target": config.target, "state_dir": str(config.state.root), "up": found is not None and found.is_up(),
        "urls": found.urls if found else {}, "processes": [{"name": r.name, "pid": r.pid, "log": r.log, "alive": r not in found.dead()}
                                                           for r in found.processes] if found else [],
        "replicas": [dataclasses.asdict(s) for s in read_observed(config.state.observed, config.target).values()],
        "versions": _versions(config), "live": dataclasses.asdict(live(config)), "drift": judge_drift(config),
        "deployment": DeploymentRecord(config.state.deployments, config.target).latest()}
    if as_json:
        print_json(facts)
    else:
        _print_status(facts)


@app.command(rich_help_panel=STACK)
def config(ctx: typer.Context, as_json: JsonFlag = False) -> None:
    """Print the settings in effect, as TOML that --config takes.

    [bold]tide config --recipe pocket_demo > mine.toml && tide up --config mine.toml[/bold]
    """
    from tide_pipeline.recipes import to_toml

    found = settings_of(ctx)
    if as_json:
        print_json(found)
    else:
        typer.echo(to_toml(found), nl=False)


def _versions(config: TideConfig) -> dict[str, str]:
    from tide_pipeline.deployment.builds import list_builds

    return {build.build_id: build.draft_version for build in list_builds(config.state.builds, config.target)}


def _stay(stack: LocalStack) -> None:
    """Until a signal, or until a part of the stack ends."""
    try:
        while stack.record.is_up():
            time.sleep(1.0)
        dead = stack.record.dead()
        console(err=True).print(f"{dead[0].name} ended: see {dead[0].log}" if dead else "", markup=False)
        raise typer.Exit(2)
    except KeyboardInterrupt:
        console().print("stopping")
    finally:
        stack.down()


def _stack_facts(stack: LocalStack) -> dict[str, Any]:
    return {"state_dir": str(stack.state.root), "config": stack.record.config_file, "urls": stack.record.urls,
            "pids": {ref.name: ref.pid for ref in stack.record.processes}}


def _print_stack(stack: LocalStack) -> None:
    screen = console()
    print_table(("", "address"), [(name, url) for name, url in stack.record.urls.items() if name != "dagster_code"])
    screen.print("\nadapt the draft by hand, on the running daemon:")
    screen.print(f"  {stack.launch_line()}", markup=False)
    screen.print("send traffic, look, stop:")
    where = "" if stack.state.root.name == ".tide" else f" --state {stack.state.root}"
    screen.print(f"  tide traffic --domain en{where}\n  tide status{where}\n  tide down{where}", markup=False)
    if stack.config.rollout.mode == "observe":
        screen.print("a draft that passes the gate is not deployed (rollout.mode is observe): --set rollout.mode=auto lets it")


def _print_status(facts: dict[str, Any]) -> None:
    screen = console()
    word = "[green]up[/green]" if facts["up"] else "[yellow]not whole[/yellow]" if facts["processes"] else "[yellow]down[/yellow] (tide up)"
    screen.print(f"target {facts['target']}, stack {word} in {facts['state_dir']}")
    if facts["processes"]:
        print_table(("process", "pid", "state"), [(p["name"], p["pid"], "running" if p["alive"] else f"ended, see {p['log']}")
                                                  for p in facts["processes"]])
        screen.print("  ".join(f"{name} {facts['urls'][name]}" for name in ("triton", "mlflow", "dagster")), markup=False)
    versions, now = facts["versions"], time.time()
    print_table(("replica", "deployment", "serves", "acceptance length", "tokens/s", "last seen"),
                [(r["replica"], r["deployment"], ", ".join(f"{tag}: {versions.get(b, b)}" for tag, b in r["drafts"].items()) or "no draft",
                  f"{r['acceptance_length']:.2f}", f"{r['tokens_per_s']:.0f}", f"{now - r['at']:.0f} s ago {r['error']}".strip())
                 for r in facts["replicas"]])
    live = facts["live"]
    if live["requests"]:
        screen.print(f"last requests, {live['age_s']:.0f} s ago: acceptance length {live['acceptance_length']:.2f}, "
                     f"{live['tokens_per_s']:.0f} tokens/s, {live['drafted_share']:.0%} of steps drafted, "
                     f"draft {live['draft_version'] or 'none'}")
    for verdict in facts["drift"]:
        word = "[red]drifted[/red]" if verdict.drifted else "no drift"
        screen.print(f"workload {verdict.workload}: {word}, {verdict.reason}")
    if (last := facts["deployment"]) is not None:
        age = (now - last.created_at) / 60
        screen.print(f"deployment {last.n} ({last.stage}) {age:.0f} min ago by {last.who}: {last.reason}", markup=False)
