"""tide rollback | deployments: what is served; and what commands that change it share."""

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
    deployment = roll_back(config, who=who_am_i(), reason=reason)
    follow_aliases(config, deployment)
    tell(deployment, as_json)


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


def confirm(question: str, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise InvalidRequest(f"{question} Nobody can be asked here: pass --yes")
    typer.confirm(question, abort=True)


def follow_aliases(config: TideConfig, deployment: Deployment) -> None:
    """MLflow's alias comes after the fact: without MLflow the deployment stands all the same."""
    from tide_pipeline.registry.registry import open_registry
    from tide_pipeline.rollout.alias import follow_alias

    registry_of_stack(config)
    try:
        follow_alias(config, open_registry(config), deployment)
    except RegistryError as error:
        typer.echo(f"warning: the champion alias was not moved: {error}", err=True)


def tell(deployment: Deployment, as_json: bool) -> None:
    if as_json:
        print_json(deployment)
    else:
        console().print(f"deployment {deployment.n} ({deployment.stage}): {deployment.reason}", markup=False)


def who_am_i() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "somebody"
