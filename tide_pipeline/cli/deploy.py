"""tide rollout | rollback | deployments: what is served."""

from __future__ import annotations

import getpass
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from tide_pipeline.cli.app import LOOK, STAGES, JsonFlag, app, console, print_json, print_table, registry_of_stack, settings_of
from tide_pipeline.errors import InvalidRequest, RegistryError

if TYPE_CHECKING:
    from tide_pipeline.config import TideConfig
    from tide_pipeline.contracts import Deployment


@app.command(rich_help_panel=STAGES)
def rollout(
    ctx: typer.Context,
    build_id: Annotated[str, typer.Argument(metavar="BUILD_ID", help="A build that passed `tide gate`.")],
    workload: Annotated[str, typer.Option("--workload", help="Which workload tag it shall serve; * is every other tag.")] = "*",
    reason: Annotated[str, typer.Option(help="Goes into the deployment record.")] = "by hand",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Serve a build: canary, bake, then everywhere, or back. Asks the gate's verdict again at the door.

    Exit code 1 when it was rolled back.

    [bold]tide rollout 3f2a9c0d11e8b7a4 --yes[/bold]
    """
    from tide_pipeline.deployment.builds import load_build
    from tide_pipeline.gate.run import load_verdict
    from tide_pipeline.rollout.promote import check_verdict, promote

    config, screen = settings_of(ctx), console(err=as_json)
    made = load_build(config.state.builds, config.target, build_id)
    verdict = load_verdict(config, build_id)
    check_verdict(config, made, verdict)
    _confirm(f"serve {made.draft_version} for workload {workload} of {config.target}?", yes)
    deployment = promote(config, made, verdict, workload=workload, who=_who(), reason=reason,
                         progress=lambda line: screen.print(line, markup=False))
    _follow(config, deployment)
    _tell(deployment, as_json)
    raise typer.Exit(0 if deployment.groups["rest"].get(workload) == build_id else 1)


@app.command(rich_help_panel=STAGES)
def rollback(
    ctx: typer.Context,
    reason: Annotated[str, typer.Option(help="Goes into the deployment record.")],
    as_json: JsonFlag = False,
) -> None:
    """Serve again what was served before the last rollout; again goes one further back.

    [bold]tide rollback --reason "more timeouts since v3"[/bold]
    """
    from tide_pipeline.rollout import rollback as roll_back

    config = settings_of(ctx)
    deployment = roll_back(config, who=_who(), reason=reason)
    _follow(config, deployment)
    _tell(deployment, as_json)


@app.command(rich_help_panel=LOOK)
def deployments(ctx: typer.Context, as_json: JsonFlag = False) -> None:
    """Every deployment of the target, newest first.

    [bold]tide deployments --json | jq '.[0]'[/bold]
    """
    from tide_pipeline.deployment.builds import list_builds
    from tide_pipeline.deployment.record import DeploymentRecord

    config = settings_of(ctx)
    history = DeploymentRecord(config.state.deployments, config.target).history()[::-1]
    if as_json:
        print_json(history)
        return
    versions = {made.build_id: made.draft_version for made in list_builds(config.state.builds, config.target)}
    print_table(("n", "when", "stage", "serves", "who", "why"),
                [(d.n, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(d.created_at)), d.stage,
                  "; ".join(f"{group} " + ", ".join(f"{tag}: {versions.get(b, b)}" for tag, b in drafts.items())
                            for group, drafts in d.groups.items()), d.who, d.reason) for d in history])


def _confirm(question: str, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise InvalidRequest(f"{question} Nobody can be asked here: pass --yes")
    typer.confirm(question, abort=True)


def _follow(config: TideConfig, deployment: Deployment) -> None:
    """MLflow's alias comes after the fact: without MLflow the deployment stands all the same."""
    from tide_pipeline.registry.registry import open_registry
    from tide_pipeline.rollout.alias import follow_alias

    registry_of_stack(config)
    try:
        follow_alias(config, open_registry(config), deployment)
    except RegistryError as error:
        typer.echo(f"warning: the champion alias was not moved: {error}", err=True)


def _tell(deployment: Deployment, as_json: bool) -> None:
    if as_json:
        print_json(deployment)
    else:
        console().print(f"deployment {deployment.n} ({deployment.stage}): {deployment.reason}", markup=False)


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "somebody"
