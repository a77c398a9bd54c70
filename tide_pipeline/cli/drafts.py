"""tide drafts list | show | diff: which drafts there are, and what made them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tide_pipeline.cli.app import LOOK, JsonFlag, app, console, print_json, print_table, registry_of_stack, settings_of
from tide_pipeline.errors import RegistryError

if TYPE_CHECKING:
    from tide_pipeline.config import TideConfig
    from tide_pipeline.registry.pedigree import Pedigree
    from tide_pipeline.registry.registry import Registry

SHOWN_SHARDS = 12                  # in a table; --json has them all
TAGS = ("workload", "acceptance_length", "windows", "rows", "parent", "origin")
COLUMNS = ("version", "draft", "alias", *TAGS)
REFERENCE = "A version, a name as in `tide drafts list`, an alias, or a draft's folder."

drafts = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="List drafts, show what made one, or what two differ in.\n\n"
                     "[bold]tide drafts diff 2 3[/bold]")
app.add_typer(drafts, name="drafts", rich_help_panel=LOOK)


@drafts.command("list")
def list_drafts(ctx: typer.Context, as_json: JsonFlag = False) -> None:
    """Every version in the registry, oldest first.

    [bold]tide drafts list[/bold]
    """
    config = settings_of(ctx)
    registry = _registry(config)
    aliases = _by_version(registry.aliases())
    rows = [(d.version, d.draft_version, aliases.get(d.version, ""), *(d.tags.get(name, "") for name in TAGS)) for d in registry.list()]
    if as_json:
        print_json([dict(zip(COLUMNS, row, strict=True)) for row in rows])
    elif rows:
        print_table(COLUMNS, rows)
    else:
        console().print(f"no draft of {config.target} is registered: tide register DIR")


@drafts.command()
def show(ctx: typer.Context, draft: Annotated[str, typer.Argument(metavar="VERSION", help=REFERENCE)], as_json: JsonFlag = False) -> None:
    """What made a draft: windows, parent, code, settings, seed, metrics.

    [bold]tide drafts show champion[/bold]
    """
    found = _Finder(settings_of(ctx)).pedigree(draft)
    if as_json:
        print_json(found)
        return
    for section, values in found.items():
        lines = [(_name(section, name), _cell(section, value)) for name, value in values.items()]
        more = len(lines) - SHOWN_SHARDS if section == "windows" else 0
        title = f"windows: {sum(len(v['rows']) for v in values.values())} of {len(values)} shards" if section == "windows" else section
        print_table((title, ""), [*lines[:SHOWN_SHARDS], (f"and {more} more", "--json has them")] if more > 0 else lines)


@drafts.command()
def diff(
    ctx: typer.Context,
    a: Annotated[str, typer.Argument(metavar="A", help=REFERENCE)],
    b: Annotated[str, typer.Argument(metavar="B", help="The same.")],
    as_json: JsonFlag = False,
) -> None:
    """What two drafts differ in, and nothing else.

    [bold]tide drafts diff 2 .tide/training/by-hand-20261122-101500/draft[/bold]
    """
    from tide_pipeline.registry.pedigree import differences

    finder = _Finder(settings_of(ctx))
    found = differences(finder.pedigree(a), finder.pedigree(b))
    if as_json:
        print_json({section: {name: {"a": one, "b": other} for name, (one, other) in values.items()} for section, values in found.items()})
    elif not found:
        console().print(f"{a} and {b} are the same draft, made alike")
    else:
        print_table(("", "", a, b), [line for section, values in found.items() for line in _lines(section, values)])


class _Finder:
    """Drafts by whatever names them; MLflow is asked only for those that are no folder."""

    def __init__(self, config: TideConfig) -> None:
        self._config = config
        self._opened: Registry | None = None

    def pedigree(self, text: str) -> Pedigree:
        """Raises RegistryError when nothing is called that, CheckpointError when the folder is no draft."""
        from tide_pipeline.registry.pedigree import pedigree

        if not text.isdigit() and Path(text).is_dir():
            return pedigree(*self._of_folder(Path(text)))
        if self._opened is None:
            self._opened = _registry(self._config)
        registry = self._opened
        version = self._version(registry, text)
        found, provenance = registry.get(version), registry.provenance(version)
        tags = {name: value for name, value in found.tags.items() if name not in provenance}
        return pedigree(provenance, {**tags, "version": found.version, "draft_version": found.draft_version, "digest": found.digest,
                                     "alias": _by_version(registry.aliases()).get(version, "")})

    def _of_folder(self, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        from tide_pipeline.models.checkpoint import digest_draft, read_identity
        from tide_pipeline.registry.run import read_provenance

        identity, provenance, digest = read_identity(folder), read_provenance(folder), digest_draft(folder)
        if provenance.get("digest", digest) != digest:
            raise RegistryError(f"{folder} holds another draft ({digest[:12]}) than its provenance.json tells of "
                                f"({provenance['digest'][:12]}): it was altered after training")
        return provenance, {"digest": digest, "target": identity.target, "engine_digest": identity.engine_digest}

    def _version(self, registry: Registry, text: str) -> int:
        if text.isdigit():
            return int(text)
        if (alias := registry.aliases().get(text)) is not None:
            return alias
        for draft in registry.list():
            if text in (draft.draft_version, f"v{draft.version}") or (len(text) >= 8 and draft.digest.startswith(text)):
                return draft.version
        raise RegistryError(f"no draft is called {text!r}: see `tide drafts list`, or name a draft's folder")


def _registry(config: TideConfig) -> Registry:
    from tide_pipeline.registry.registry import open_registry

    registry_of_stack(config)
    return open_registry(config)


def _by_version(aliases: Mapping[str, int]) -> dict[int, str]:
    found: dict[int, str] = {}
    for name, version in sorted(aliases.items()):
        found[version] = f"{found[version]}, {name}" if version in found else name
    return found


def _lines(section: str, values: Mapping[str, tuple[Any, Any]]) -> list[tuple[str, str, str, str]]:
    lines = [(section, _name(section, name), _cell(section, one), _cell(section, other)) for name, (one, other) in values.items()]
    if section == "windows" and len(lines) > SHOWN_SHARDS:
        only_a, only_b = (sum(pair[1 - i] is None for pair in values.values()) for i in (0, 1))
        both = len(values) - only_a - only_b
        lines = [*lines[:SHOWN_SHARDS], (section, f"and {len(values) - SHOWN_SHARDS} more shards, --json has them",
                                         f"{only_a} of all only here", f"{only_b} of all only here; {both} in both with other rows")]
    return [(section if i == 0 else "", name, one, other) for i, (_, name, one, other) in enumerate(lines)]


def _name(section: str, name: str) -> str:
    """A shard's own name tells it from all others; where it lies is in --json."""
    return name.rpartition("/")[2] if section == "windows" else name


def _cell(section: str, value: Any) -> str:
    if value is None:
        return "-"
    if section == "windows":
        return f"{len(value['rows'])} windows" + (f" {value['digest'][:12]}" if value["digest"] else "")
    return f"{value:.5g}" if isinstance(value, float) else str(value)
