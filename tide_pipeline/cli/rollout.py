"""tide rollout: begin one, follow it, hold it, end it. `tide rollout BUILD_ID` begins one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from tide_pipeline.cli.app import STAGES, JsonFlag, app, console, print_json, print_table, settings_of
from tide_pipeline.cli.deploy import confirm, follow_aliases, tell, who_am_i

if TYPE_CHECKING:
    from tide_pipeline.contracts import Deployment
    from tide_pipeline.rollout.overview import Overview

Reason = Annotated[str, typer.Option("--reason", help="Goes into the deployment record.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")]


class RolloutGroup(TyperGroup):
    """A word that is no command is a build to roll out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = ["start", *args]
        return super().parse_args(ctx, args)


rollout = typer.Typer(cls=RolloutGroup, no_args_is_help=True, rich_markup_mode="rich",
                      help="Serve a build: canary, bake, steps, or back. Follow, hold and end it.\n\n"
                           "[bold]tide rollout 3f2a9c0d11e8b7a4 --yes[/bold]   [bold]tide rollout status[/bold]")
app.add_typer(rollout, name="rollout", rich_help_panel=STAGES)


@rollout.command()
def start(
    ctx: typer.Context,
    build_id: Annotated[str, typer.Argument(metavar="BUILD_ID", help="A build that passed `tide gate`.")],
    workload: Annotated[str, typer.Option("--workload", help="Which workload tag it shall serve; * is every other tag.")] = "*",
    reason: Reason = "by hand",
    yes: Yes = False,
    as_json: JsonFlag = False,
) -> None:
    """Serve a build: canary, bake, steps, then everywhere, or back. Asks the gate's verdict again at the door.

    Whatever rollout.mode says: who calls it has decided. Exit code 1 when it was rolled back.

    [bold]tide rollout start 3f2a9c0d11e8b7a4 --workload de --yes[/bold]
    """
    from tide_pipeline.deployment.builds import load_build
    from tide_pipeline.gate.run import load_verdict
    from tide_pipeline.rollout.promote import check_verdict, promote

    config, screen = settings_of(ctx), console(err=as_json)
    made = load_build(config.state.builds, config.target, build_id)
    verdict = load_verdict(config, build_id)
    check_verdict(config, made, verdict)
    confirm(f"serve {made.draft_version} for workload {workload} of {config.target}?", yes)
    deployment = promote(config, made, verdict, workload=workload, who=who_am_i(), reason=reason, by_person=True,
                         progress=lambda line: screen.print(line, markup=False))
    follow_aliases(config, deployment)
    tell(deployment, as_json)
    raise typer.Exit(0 if deployment.groups["rest"].get(workload) == build_id else 1)


@rollout.command()
def approve(ctx: typer.Context, reason: Reason = "approved by hand", yes: Yes = False, as_json: JsonFlag = False) -> None:
    """Mode propose: roll out what is proposed. The job approve_rollout does the same in Dagster.

    [bold]tide rollout approve --yes[/bold]
    """
    from tide_pipeline.rollout import by_hand
    from tide_pipeline.rollout.overview import Onlooker

    config, screen = settings_of(ctx), console(err=as_json)
    confirm(f"{Onlooker(config).look().next}. Roll it out?", yes)
    deployment = by_hand.approve(config, who=who_am_i(), reason=reason, progress=lambda line: screen.print(line, markup=False))
    follow_aliases(config, deployment)
    tell(deployment, as_json)
    raise typer.Exit(0 if deployment.stage == "stable" else 1)


@rollout.command()
def advance(ctx: typer.Context, follow: Annotated[bool, typer.Option("--follow", help="Until it has ended.")] = False) -> None:
    """Look once and write at most one record, as Dagster's rollout_sensor does every few seconds.

    Where there is no Dagster: a cron line, or --follow.

    [bold]tide rollout advance --follow[/bold]
    """
    from tide_pipeline.rollout.drive import Driver
    from tide_pipeline.rollout.history import began_of, is_under_way

    config, screen = settings_of(ctx), console()
    driver = Driver(config, who_am_i())
    if follow and (latest := driver.record.latest()) is not None and is_under_way(latest):
        ended = driver.drive(began_of(latest), lambda line: screen.print(line, markup=False))
        follow_aliases(config, ended)
        tell(ended, as_json=False)
        return
    done = driver.advance()
    screen.print(f"wrote deployment {done.deployment.n}: {done.action.reason}" if done.wrote and done.deployment else done.action.reason,
                 markup=False)


@rollout.command()
def status(ctx: typer.Context, as_json: JsonFlag = False) -> None:
    """Stage, replicas, and what would happen next, with the numbers. Writes nothing.

    [bold]tide rollout status --json | jq .next[/bold]
    """
    from tide_pipeline.rollout.overview import Onlooker

    seen = Onlooker(settings_of(ctx)).look()
    if as_json:
        print_json(seen)
    else:
        print_overview(seen)


@rollout.command()
def pause(ctx: typer.Context, reason: Reason = "by hand", as_json: JsonFlag = False) -> None:
    """Stop going forward. What goes wrong meanwhile is still rolled back.

    [bold]tide rollout pause --reason "release of the app"[/bold]
    """
    _act(ctx, "pause", reason, as_json)


@rollout.command()
def resume(ctx: typer.Context, reason: Reason = "by hand", as_json: JsonFlag = False) -> None:
    """Go on with a paused rollout; the times of its stage begin anew.

    [bold]tide rollout resume[/bold]
    """
    _act(ctx, "resume", reason, as_json)


@rollout.command()
def abort(ctx: typer.Context, reason: Reason = "by hand", as_json: JsonFlag = False) -> None:
    """End a rollout, or drop a proposal: every replica serves what it did before.

    [bold]tide rollout abort --reason "wrong window"[/bold]
    """
    _act(ctx, "abort", reason, as_json)


@rollout.command()
def pin(ctx: typer.Context, reason: Reason = "by hand", as_json: JsonFlag = False) -> None:
    """Keep what is served: no rollout begins until `unpin`. `tide rollback` still works.

    [bold]tide rollout pin --reason "the customer measures this week"[/bold]
    """
    _act(ctx, "pin", reason, as_json)


@rollout.command()
def unpin(ctx: typer.Context, reason: Reason = "by hand", as_json: JsonFlag = False) -> None:
    """Let rollouts begin again.

    [bold]tide rollout unpin[/bold]
    """
    _act(ctx, "unpin", reason, as_json)


@rollout.command()
def history(ctx: typer.Context, last: Annotated[int, typer.Option(help="How many records.")] = 30, as_json: JsonFlag = False) -> None:
    """Who did what, when and why: every record, newest first.

    [bold]tide rollout history --last 5[/bold]
    """
    from tide_pipeline.deployment.record import DeploymentRecord

    config = settings_of(ctx)
    found = DeploymentRecord(config.state.deployments, config.target).history()
    told = [(d.n, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(d.created_at)), what_was_done(before, d), d.who, d.reason)
            for before, d in zip([None, *found], found, strict=False)][::-1][:last]
    if as_json:
        print_json([dict(zip(("n", "at", "what", "who", "why"), row, strict=True)) for row in told])
    else:
        print_table(("n", "when", "what", "who", "why"), told)


def what_was_done(before: Deployment | None, after: Deployment) -> str:
    """One record in words."""
    hold = before.hold if before is not None else ""
    if before is not None and hold != after.hold and before.stage == after.stage:
        return {"paused": "paused", "pinned": "pinned", "": "resumed" if hold == "paused" else "unpinned"}[after.hold]
    words = {"canary": "canary on", "rolling": "step to", "rolled_back": "rolled back", "proposed": "proposed", "stable": "served by all"}
    what = words.get(after.stage, after.stage)
    return f"{what} {', '.join(after.canary_replicas)}".strip() + (f" (rollout {after.began})" if after.began else "")


def print_overview(seen: Overview) -> None:
    screen = console()
    for line in headlines(seen):
        screen.print(line, markup=False)
    print_table(*replica_table(seen))


def headlines(seen: Overview) -> list[str]:
    latest = seen.deployment
    if latest is None:
        return [f"{seen.target}, mode {seen.mode}: nothing was ever deployed"]
    served = ", ".join(f"{tag}: {seen.versions.get(build, build)}" for tag, build in latest.groups["rest"].items()) or "no draft"
    new = ", ".join(f"{tag}: {seen.versions.get(build, build)}" for tag, build in latest.groups.get("canary", {}).items()
                    if latest.groups["rest"].get(tag) != build)
    return [f"{seen.target}, mode {seen.mode}: deployment {latest.n}, {seen.stage}{f' ({latest.hold})' if latest.hold else ''} "
            f"for {seen.since_s:.0f} s, by {latest.who}",
            f"serves {served}" + (f"   rolls out {new}" if new else ""), f"next: {seen.next}"]


def replica_table(seen: Overview) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Columns and rows."""
    rows = [(r.name, r.group, r.deployment, ", ".join(f"{tag}: {version}" for tag, version in r.versions.items()) or "no draft",
             f"{r.acceptance_length:.2f}", f"{r.tokens_per_s:.0f}", f"{r.state} {r.age_s:.0f} s ago {r.error}".strip())
            for r in seen.replicas]
    return ("replica", "draft", "deployment", "serves", "acceptance length", "tokens/s", "state"), rows


def _act(ctx: typer.Context, what: str, reason: str, as_json: bool) -> None:
    from tide_pipeline.rollout import by_hand

    act: Callable[..., Deployment] = getattr(by_hand, what)
    tell(act(settings_of(ctx), who=who_am_i(), reason=reason), as_json)
