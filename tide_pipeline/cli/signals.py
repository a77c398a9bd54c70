"""tide signals verify | delete | compact | retain: care for the signal lake by hand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tide_pipeline.cli.app import LOOK, JsonFlag, app, console, print_json, print_table, settings_of
from tide_pipeline.config import RetentionSettings, override
from tide_pipeline.errors import InvalidRequest

if TYPE_CHECKING:
    from tide_pipeline.capture.shard import Origin
    from tide_pipeline.config import TideConfig

signals = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Check, delete, compact and expire what the engine captured.\n\n"
                      "[bold]tide signals verify[/bold]")
app.add_typer(signals, name="signals", rich_help_panel=LOOK)


@signals.command()
def verify(ctx: typer.Context, as_json: JsonFlag = False) -> None:
    """Read every live shard through: checksums, digests, copies, and whether the states are those of the engine that is served.

    Exit code 1 when something is wrong. Nothing is repaired: move what is bad out of the lake.

    [bold]tide signals verify[/bold]
    """
    from tide_pipeline.training.lake_check import check_lake

    found = check_lake(settings_of(ctx))
    if as_json:
        print_json(found)
    else:
        for name, part in found.items():
            console().print(f"{name}: {part.shards} shards" + (f", {part.windows} windows" if name == "signals" else "")
                            + ("" if part.findings else ", nothing wrong"), markup=False)
        if rows := [(f.kind, f.detail, f.shard) for part in found.values() for f in part.findings]:
            print_table(("problem", "what", "shard"), rows)
    raise typer.Exit(0 if all(part.is_sound for part in found.values()) else 1)


@signals.command()
def delete(
    ctx: typer.Context,
    request: Annotated[str | None, typer.Option(metavar="ID", help="A request id, as the client sent it.")] = None,
    tenant: Annotated[str | None, typer.Option(metavar="NAME", help="All that is stored of a tenant until now.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Delete what was captured of a request or a tenant, in every target, and name the drafts that were trained on it.

    Rows of signals go; rows of acceptance stay as counts without request id and tenant. It can be called again, and goes on where it
    was cut short. A tenant that goes on sending requests belongs into capture.opted_out_tenants too. Exit code 1 when files that
    can't be read may hold more.

    [bold]tide signals delete --request 3f2a9c0d[/bold]
    """
    from tide_pipeline.capture.delete import delete as delete_rows

    if (request is None) == (tenant is None):
        raise InvalidRequest("say what to delete: either --request ID or --tenant NAME")
    config = settings_of(ctx)
    done = delete_rows(config.state.lake, request_id=request, tenant=tenant)
    drafts = list(drafts_trained_on(config, done.windows))
    unfinished = [str(folder) for folder in runs_that_read(config, done.windows)]
    if as_json:
        print_json({"windows": done.signal_rows, "acceptance_rows": done.acceptance_rows, "removed_files": done.removed_files,
                    "unreadable": [[file.uri, why] for file, why in done.unreadable], "drafts": drafts, "unfinished_runs": unfinished})
    else:
        screen = console()
        screen.print(f"removed {done.signal_rows} windows, made {done.acceptance_rows} acceptance rows nameless", markup=False)
        for file, why in done.unreadable:
            screen.print(f"may hold more: {file}: {why}; move it out of the lake", markup=False)
        for run in unfinished:
            screen.print(f"an unfinished training run read it: remove {run}", markup=False)
        if drafts:
            print_table(("draft", "windows trained on", "folder"), [(d["digest"][:12], d["windows"] or "through its parent", d["folder"])
                                                                    for d in drafts], title="drafts that were trained on what was deleted")
        else:
            screen.print("no draft here was trained on it")
    raise typer.Exit(0 if done.is_complete else 1)


@signals.command()
def compact(ctx: typer.Context, as_json: JsonFlag = False) -> None:
    """Put the small shards of each hour together, carry out late deletions, remove what was replaced an hour ago.

    Writers and readers go on meanwhile.

    [bold]tide signals compact[/bold]
    """
    from tide_pipeline.capture.compact import compact as compact_lake

    done = compact_lake(settings_of(ctx).state.lake)
    if as_json:
        print_json({"compacted_shards": done.compacted_shards, "new_shards": done.new_shards, "removed_files": done.removed_files,
                    "damaged": [[file.uri, why] for file, why in done.damaged]})
    else:
        console().print(f"{done.compacted_shards} shards became {done.new_shards}; removed {done.removed_files} old files", markup=False)
        for file, why in done.damaged:
            console().print(f"left out: {file}: {why}; see tide signals verify", markup=False)


@signals.command()
def retain(
    ctx: typer.Context,
    signal_days: Annotated[float | None, typer.Option(min=0.0, help="Remove signals older than this; 0 keeps them for ever.")] = None,
    acceptance_days: Annotated[float | None, typer.Option(min=0.0, help="Remove the acceptance log older than this.")] = None,
    signal_gb: Annotated[float | None, typer.Option("--signal-gb", min=0.0, help="Remove the oldest signals above this many GB.")] = None,
    tenant: Annotated[list[str] | None, typer.Option(metavar="NAME=DAYS", help="An age for one tenant's rows. Repeatable.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Remove what is too old or too much: whole hours by age, oldest shards by bytes, rows by tenant.

    What is not said here is as in the settings' table [retention], which Dagster's retain_lake carries out every night.

    [bold]tide signals retain --signal-days 30 --signal-gb 200 --tenant acme=7[/bold]
    """
    from tide_pipeline.capture.retain import Retention
    from tide_pipeline.capture.retain import retain as retain_lake

    config = settings_of(ctx)
    said = {"signal_days": signal_days, "acceptance_days": acceptance_days, "signal_gb": signal_gb, "tenant_days": tenant}
    keep = override(config, {"retention": {name: value for name, value in said.items() if value is not None}}).retention
    if dataclasses.replace(keep, drafts_keep=0, training_keep=0) == RetentionSettings():
        raise InvalidRequest("say what to keep: --signal-days, --acceptance-days, --signal-gb or --tenant NAME=DAYS, or set [retention]")
    done = retain_lake(config.state.lake, Retention.of(keep))
    if as_json:
        print_json({"expired_shards": done.expired_shards, "removed_files": done.removed_files, "left_bytes": done.left_bytes})
    else:
        left = ", ".join(f"{name} {size / 1e9:.3f} GB" for name, size in done.left_bytes.items())
        console().print(f"expired {done.expired_shards} shards, removed {done.removed_files} files; left: {left}", markup=False)


def drafts_trained_on(config: TideConfig, windows: Iterable[Origin]) -> Iterator[dict[str, Any]]:
    """Drafts in training, builds and the local registry whose certificate names one of these windows, and drafts that began with those."""
    state, seen = config.state, set[str]()
    addresses = {address for origin in windows for address in origin}
    certificates = [(file.parent, facts) for root in (state.training, state.builds, state.mlflow)
                    for file in sorted(root.rglob("provenance.json")) if (facts := _json(file)) and isinstance(facts.get("digest"), str)]
    tainted: set[str] = set()
    for _ in range(len(certificates) + 1):                 # children of children
        before = len(tainted)
        for folder, facts in certificates:
            count = _read(facts.get("shards", {}), addresses)
            digest, parent = facts["digest"], str(facts.get("parent", "")).rpartition("-")[2]
            if not count and not (parent and any(other.startswith(parent) for other in tainted)):
                continue
            tainted.add(digest)
            if digest not in seen:
                seen.add(digest)
                yield {"digest": digest, "windows": count, "folder": str(folder), "workload": facts.get("workload", "")}
        if len(tainted) == before:
            return


def runs_that_read(config: TideConfig, windows: Iterable[Origin]) -> Iterator[Path]:
    """Folders of training runs that were cut short and hold references to these windows."""
    addresses = {address for origin in windows for address in origin}
    for file in sorted(config.state.training.rglob("run.json")):
        parts = (_json(file) or {}).get("windows", {}).values()
        if any((_name(w["uri"]), w["row"]) in addresses for part in parts for w in part):
            yield file.parent


def _read(shards: dict[str, list[int]], addresses: set[tuple[str, int]]) -> int:
    return sum((_name(uri), row) in addresses for uri, rows in shards.items() for row in rows)


def _name(uri: str) -> str:
    return uri.rpartition("/")[2]


def _json(file: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return found
