"""The application itself: options that every command shares, settings, output, errors. Knows no stage."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from tide_pipeline import __version__, recipes
from tide_pipeline.config import TideConfig, merge, override
from tide_pipeline.errors import SettingsError, TideError

if TYPE_CHECKING:
    from rich.console import Console

    from tide_pipeline.stack.local import LocalStack

WITH_VALUE = ("--recipe", "--config", "--set", "--state", "--engine")
SHARED = (*WITH_VALUE, "--debug")
STACK, STAGES, LOOK = "The stack", "Stages of the loop, by hand", "Look"
ORDER = ("demo", "up", "down", "status", "config", "traffic", "drift", "train", "register", "build", "gate", "rollout", "rollback",
         "top", "deployments", "drafts", "engines", "sql", "signals", "report", "doctor")

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout and nothing else.")]
Workload = Annotated[str, typer.Option("--workload", help="Workload tag: drafts, drift and training are kept apart by it.")]


class Group(TyperGroup):
    """Shared options may stand anywhere on the line; an error of ours is one line and exit code 2."""

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order of the loop."""
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, hoist(args))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TideError as error:
            if ctx.params.get("debug"):
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error


def hoist(args: Sequence[str]) -> list[str]:
    """Shared options and their values first, the rest in its order; nothing after `--` is looked at."""
    first, rest, words = [], [], iter(args)
    for word in words:
        if word == "--":
            rest += [word, *words]
        elif word in WITH_VALUE:
            first += [word, *([value] if (value := next(words, None)) is not None else [])]
        elif word in SHARED or word.split("=")[0] in WITH_VALUE:
            first.append(word)
        else:
            rest.append(word)
    return [*first, *rest]


app = typer.Typer(name="tide", cls=Group, no_args_is_help=True, add_completion=False, rich_markup_mode="rich",
                  pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
                  help="Keep speculative decoding fast while traffic changes: serve, capture, notice drift, retrain, prove, roll out.",
                  epilog="Options above may stand anywhere on the line: [bold]tide up --set drift.min_drop=0.2[/bold]. "
                         "Begin with [bold]tide demo[/bold], or [bold]tide up[/bold] and [bold]tide traffic --domain en[/bold].")


@dataclass(frozen=True)
class Choice:
    """The shared options as given."""

    recipe: str | None = None
    config: Path | None = None
    values: tuple[str, ...] = ()
    state: Path | None = None
    engine: str | None = None

    def settings(self, *, fresh: bool = False, recipe: str = "pocket_cpu") -> TideConfig:
        """Settings for a command: of the stack that is up, unless `fresh` or a recipe or file was named; options on top."""
        return override(self._base(fresh, recipe), self._given())

    def _base(self, fresh: bool, recipe: str) -> TideConfig:
        if fresh or self.recipe or self.config:
            return recipes.load(self.recipe or recipe, self.config)
        from_stack = self._of_stack(recipes.load(recipe))
        if from_stack is not None:
            return from_stack
        return recipes.from_environment() if os.environ.get("TIDE_CONFIG") else recipes.load(recipe)

    def _of_stack(self, default: TideConfig) -> TideConfig | None:
        from tide_pipeline.stack.local import LocalStack

        fallback = recipes.from_environment() if os.environ.get("TIDE_CONFIG") else default
        stack = LocalStack.running((override(fallback, {"state_dir": str(self.state)}) if self.state else fallback).state)
        return stack.config if stack else None

    def _given(self) -> dict[str, Any]:
        given: dict[str, Any] = {}
        for text in self.values:
            given = merge(given, parse_value(text))
        named = {"state_dir": str(self.state.resolve()) if self.state else None, "engine": self.engine}
        return merge(given, {name: value for name, value in named.items() if value is not None})


def parse_value(text: str) -> dict[str, Any]:
    """`drift.min_drop=0.2` as nested tables; a value that is no TOML is a string. Raises SettingsError without a `=`."""
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise SettingsError(f"--set {text}: expected key=value, such as drift.min_drop=0.2")
    try:
        value: Any = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    for name in reversed(key.strip().split(".")):
        value = {name: value}
    found: dict[str, Any] = value
    return found


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tide {__version__}")
        raise typer.Exit


@app.callback()
def shared(
    ctx: typer.Context,
    recipe: Annotated[str | None, typer.Option(help=f"Named settings to start from: {', '.join(recipes.RECIPES)}, "
                                              "or ENGINE/SERVING+TRAINING GPUs: qwen3-8b/h100+l40s.")] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="TOML file of settings on top of the recipe.")] = None,
    values: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting, as TOML: drift.min_drop=0.2. "
                                                     "Repeatable; `tide config` shows them all.")] = None,
    state: Annotated[Path | None, typer.Option(metavar="DIR", file_okay=False, help="State directory (default: .tide in the checkout). "
                                               "Stacks of different directories run side by side.")] = None,
    engine: Annotated[str | None, typer.Option(metavar="NAME", help="Folder under engines/.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    ctx.obj = Choice(recipe, config, tuple(values or ()), state, engine)


def settings_of(ctx: typer.Context, **how: Any) -> TideConfig:
    choice: Choice = ctx.obj
    return choice.settings(**how)


def stack_of(config: TideConfig) -> LocalStack:
    """The stack that is up; commands of this process talk to its MLflow. Raises StackError that says `tide up`."""
    from tide_pipeline.stack.local import LocalStack
    from tide_pipeline.stack.record import need

    stack = LocalStack(config.state, need(config.state))
    os.environ.setdefault("TIDE_MLFLOW_URI", stack.mlflow_url)
    return stack


def registry_of_stack(config: TideConfig) -> None:
    """Use the MLflow of the stack when one is up; without it the database in the state directory."""
    from tide_pipeline.stack.local import LocalStack

    if (stack := LocalStack.running(config.state)) is not None:
        os.environ.setdefault("TIDE_MLFLOW_URI", stack.mlflow_url)


def console(*, err: bool = False) -> Console:
    from rich.console import Console

    screen = Console(stderr=err, highlight=False, soft_wrap=True)
    if not screen.is_terminal:
        screen.width = 240                                 # tables in a file or a pipe keep their lines whole
    return screen


def print_json(value: Any) -> None:
    """Records become objects."""
    typer.echo(json.dumps(value, indent=2, default=_plain))


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else str(value)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> None:
    from rich.table import Table

    table = Table(*columns, title=title or None, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    console().print(table)


@contextlib.contextmanager
def orderly() -> Iterator[None]:
    """SIGTERM is as good as Ctrl-C: what was started is stopped."""
    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    app(prog_name="tide")
