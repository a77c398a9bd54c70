"""tide engines list | check | memory | schedule: which targets there are, whether their folders are in order, what fits, what pays."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tide_pipeline.cli.app import LOOK, JsonFlag, app, console, print_json, print_table, settings_of
from tide_pipeline.errors import InvalidRequest, SettingsError

if TYPE_CHECKING:
    from tide_pipeline.build.schedule import LearnedSchedule
    from tide_pipeline.config import TideConfig
    from tide_pipeline.engine.memory import ServingMemory
    from tide_pipeline.engine_spec import EngineSpec

GB = 10**9
COLUMNS = ("gpus", "weights", "draft", "taps", "ring", "activations", "taken", "of", "kB a token", "cache, tokens", "full requests",
           "fits")

engines = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="The targets under engines/: list them, check them, see what "
                      "memory they take and which draft lengths pay. No GPU needed.\n\n[bold]tide engines check[/bold]")
app.add_typer(engines, name="engines", rich_help_panel=LOOK)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Folder under engines/.")]


@engines.command("list")
def list_all(ctx: typer.Context, as_json: JsonFlag = False) -> None:
    """Every engine: backend, target, draft, recipes.

    [bold]tide engines list[/bold]
    """
    from tide_pipeline.build.check import list_engines

    folder = Path(settings_of(ctx).engines_dir)
    rows = [_row(folder / name) for name in list_engines(folder)]
    if as_json:
        print_json(rows)
    else:
        print_table(("engine", "backend", "target", "starting draft", "recipes"), [tuple(row.values()) for row in rows])


@engines.command()
def check(
    ctx: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Folders under engines/; all of them without.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Validate engine folders without a GPU: fields, layers, revisions, drafts, memory, recipes, arguments for each TensorRT-LLM line.

    Exit code 1 when anything is wrong.

    [bold]tide engines check qwen3-8b[/bold]
    """
    from tide_pipeline.build.check import check_engine, list_engines

    folder = Path(settings_of(ctx).engines_dir)
    wanted = names or list_engines(folder)
    if unknown := [name for name in wanted if not (folder / name).is_dir()]:
        raise SettingsError(f"no engine {unknown[0]!r} in {folder}: there are {', '.join(list_engines(folder))}")
    found = [finding for name in wanted for finding in check_engine(folder / name)]
    if as_json:
        print_json(found)
    else:
        print_table(("engine", "check", "", "what"), [(f.engine, f.check, "ok" if f.passed else "WRONG", f.text) for f in found])
        wrong = sum(not f.passed for f in found)
        console().print(f"{len(found)} checks of {len(wanted)} engines, {wrong} wrong" if wrong else
                        f"{len(found)} checks of {len(wanted)} engines, all passed")
    raise typer.Exit(0 if all(f.passed for f in found) else 1)


@engines.command()
def memory(
    ctx: typer.Context,
    name: Name,
    gpu: Annotated[str | None, typer.Option(metavar="CLASS", help="One class, such as h100; without it those of its recipes.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="That the target is split over, with --gpu.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Requests in a step, with --gpu.")] = 64,
    as_json: JsonFlag = False,
) -> None:
    """What one serving GPU holds, in GB: an estimate from the target's numbers.

    [bold]tide engines memory llama-3.3-70b --gpu h100 --gpus 4[/bold]
    """
    from tide_pipeline.engine_spec import load_engine_spec

    config = settings_of(ctx)
    spec = load_engine_spec(Path(config.engines_dir) / name)
    if not spec.architecture.hidden_size:
        raise SettingsError(f"{name} has no [architecture] in its engine.toml: its memory is not estimated")
    found = _of_one_gpu(config, name, gpu, gpus, batch) if gpu else _of_recipes(Path(config.engines_dir), name)
    if as_json:
        print_json([{**dataclasses.asdict(m), "fixed": m.fixed, "fits": m.fits} for m in found])
        return
    print_table(COLUMNS, [_line(m, spec.max_context) for m in found], f"{name}, GB of one GPU")
    console().print(f"full requests are of {spec.max_context:,} tokens; weights and cache are exact, activations and 3 GB of overhead a "
                    "guess on the high side" if found else "its recipes.toml has no [serve.<gpu>] table: name a class with --gpu")


@engines.command()
def schedule(
    ctx: typer.Context,
    since: Annotated[str | None, typer.Option(metavar="AGO|TIME", help="30m, 12h, 7d, or 2026-02-07T09:00 (UTC). Without it 24 hours "
                                              "for acceptance, 30 days for step times.")] = None,
    draft_version: Annotated[str, typer.Option(help="Whose survival counts; without it the draft's that was served last.")] = "",
    trtllm: Annotated[str | None, typer.Option(metavar="LINE", help="1.2, 1.3 or 1.4; without it serve.trtllm.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Draft length by batch size, learned from what was served: what `tide build` puts into a build for TensorRT-LLM.

    Exit code 2 where too little was served; it says what to serve with.

    [bold]tide engines schedule --recipe qwen3-8b/h100 --since 7d[/bold]
    """
    from tide_pipeline.build.schedule import learn_schedule
    from tide_pipeline.cli.drift import moment
    from tide_pipeline.engine_spec import load_engine_spec
    from tide_pipeline.recipes import first_recipe

    config = settings_of(ctx)
    spec = load_engine_spec(config.engine_dir)
    if spec.backend != "trtllm":
        raise InvalidRequest(f"engine {spec.name} is for backend {spec.backend!r}, which chooses the draft length of every step by itself: "
                             "name an engine for TensorRT-LLM with --engine (`tide engines list`)")
    if not config.serve.gpu:
        config = settings_of(ctx, fresh=True, recipe=first_recipe(config.engine_dir))
    until = time.time()
    found = learn_schedule(config, spec, until, version=draft_version, since=moment(since, until) if since else None)
    form = _said_to(trtllm or config.serve.trtllm, config, spec, found)
    if as_json:
        print_json({"schedule": found.schedule, **form, "rows": [dataclasses.asdict(row) for row in found.rows], **found.origin()})
        return
    print_table(("up to a batch of", "draft length", "tokens/s", "all of the longest", "without drafts"),
                [(str(r.batch), str(r.length), *(f"{x:,.0f}" for x in (r.best, r.longest, r.plain))) for r in found.rows])
    chances, since_when = ", ".join(f"{chance:.2f}" for chance in found.chances), found.origin()["survival_since"]
    console().print(f"{form['advice']}\n{found.drafted_steps} drafted steps of {found.draft_version} since {since_when}; the chance that "
                    f"the first 1, 2, .. tokens are accepted: {chances}", markup=False)


def _said_to(line: str, config: TideConfig, spec: EngineSpec, found: LearnedSchedule) -> dict[str, Any]:
    """What it means for a version line: the keys that it takes, or what to do where it takes none."""
    from tide_pipeline.engine.trtllm.facts import table_for
    from tide_pipeline.engine.trtllm.options import draft_length, translate_schedule

    table, until = table_for(line), found.best_until
    if not table.names["one_model_length_control"]:
        return {"line": table.line, "draft_len_schedule": None,
                "advice": f"TensorRT-LLM {table.line} can't change the draft length by batch size. Drafts pay up to {until} requests in a "
                          f"step: give speculative replicas \"best_until\": {until} in the replicas file, beside plain ones"}
    keys = translate_schedule(found.schedule, table.layout.schedule, draft_length(spec, config), config.serve.max_batch)
    by_hand = [[batch, length] for batch, length in found.schedule.items()]
    return {"line": table.line, "draft_len_schedule": keys,
            "advice": f"TensorRT-LLM {table.line}: draft_len_schedule = {keys}. `tide build` puts it into the build; by hand: "
                      f"--set 'speculation.draft_schedule={by_hand}'"}


def _row(engine_dir: Path) -> dict[str, Any]:
    from tide_pipeline import recipes
    from tide_pipeline.engine_spec import load_engine_spec

    spec, tables = load_engine_spec(engine_dir), recipes.gpu_tables(engine_dir)
    target = f"{spec.repo}@{spec.revision[:8]}" if spec.repo else spec.model
    draft = f"{spec.draft.repo}@{spec.draft.revision[:8]}" if spec.draft.repo else spec.champion or "from scratch"
    gpus = " ".join(tables.get("serve", {})) + (" + " + " ".join(tables["train"]) if tables.get("train") else "")
    return {"engine": engine_dir.name, "backend": spec.backend, "target": target, "draft": draft, "recipes": gpus}


def _of_one_gpu(config: TideConfig, name: str, gpu: str, gpus: int, batch: int) -> list[ServingMemory]:
    from tide_pipeline.engine.gpus import gpu_named
    from tide_pipeline.engine.memory import serving_memory
    from tide_pipeline.engine_spec import load_engine_spec

    serve = dataclasses.replace(config.serve, gpu=gpu, gpus=gpus, max_batch=batch, prefill_chunk=max(config.serve.prefill_chunk, 8_192))
    return [serving_memory(load_engine_spec(Path(config.engines_dir) / name), serve, gpu_named(gpu))]


def _of_recipes(engines_dir: Path, name: str) -> list[ServingMemory]:
    from tide_pipeline import recipes
    from tide_pipeline.engine.gpus import gpu_named
    from tide_pipeline.engine.memory import serving_memory
    from tide_pipeline.engine_spec import load_engine_spec

    spec = load_engine_spec(engines_dir / name)
    configs = [recipes.on_gpus(f"{name}/{gpu}", engines_dir) for gpu in recipes.gpu_tables(engines_dir / name).get("serve", {})]
    return [serving_memory(spec, config.serve, gpu_named(config.serve.gpu)) for config in configs]


def _line(m: ServingMemory, max_context: int) -> tuple[str, ...]:
    parts = (m.weights, m.draft, m.tap_buffers, m.ring, m.activations, m.fixed, m.gpu.memory)
    return (f"{m.gpus} x {m.gpu.name}", *(f"{part / GB:.1f}" for part in parts), f"{m.kv_token / 1e3:.1f}", f"{m.kv_tokens:,}",
            str(m.kv_tokens // max_context), "yes" if m.fits else "no")
