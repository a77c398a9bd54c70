"""tide train | register | build | gate: one draft, from captured windows to a verdict."""

from __future__ import annotations

import dataclasses
import json
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tide_pipeline.cli.app import STAGES, JsonFlag, Workload, app, console, print_json, print_table, registry_of_stack, settings_of
from tide_pipeline.config import override
from tide_pipeline.engine_spec import load_engine_spec
from tide_pipeline.errors import CheckpointError, InvalidRequest

if TYPE_CHECKING:
    from tide_pipeline.config import TideConfig
    from tide_pipeline.contracts import DraftCheckpoint


class Backend(StrEnum):
    EMBEDDED = "embedded"
    TRTLLM = "trtllm"


@app.command(rich_help_panel=STAGES)
def train(
    ctx: typer.Context,
    workload: Workload = "default",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the new draft; an unfinished run in it goes on.")] = None,
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="Don't start from the draft that is served.")] = False,
    since: Annotated[str, typer.Option(metavar="TIME", help="Train on nothing captured before, such as 2026-11-20T09:00 (UTC).")] = "",
    until: Annotated[str, typer.Option(metavar="TIME", help="Train on nothing captured then or later.")] = "",
    as_json: JsonFlag = False,
) -> None:
    """Train a draft on what was captured of a workload, starting from the one that serves it.

    [bold]tide train --workload default --set training.time_budget_s=60[/bold]

    [bold]tide train --since 2026-11-20T09:00 --until 2026-11-20T12:00[/bold]
    """
    from tide_pipeline.defs.adaptation import served_build
    from tide_pipeline.recipes import freeze
    from tide_pipeline.training.__main__ import main as run_training
    from tide_pipeline.training.span import Span

    config, span = settings_of(ctx), Span.of(since, until)
    folder = out or config.state.training / f"by-hand-{time.strftime('%Y%m%d-%H%M%S')}" / "draft"
    folder.mkdir(parents=True, exist_ok=True)
    freeze(config, folder.parent / "settings.toml")
    champion = None if from_scratch else served_build(config, workload)
    line = ["--workload", workload, "--out", str(folder), "--config", str(folder.parent / "settings.toml")]
    line += ["--champion", f"{champion.path}/draft", "--parent", champion.draft_version] if champion else []
    line += ["--since", span.texts[0], "--until", span.texts[1]] if not span.is_all else []
    code = run_training([*line, "--json"] if as_json else line)
    if code == 0 and not as_json:
        console().print(f"next: tide register {folder}", markup=False)
    raise typer.Exit(2 if code == 1 else code)             # a stage that failed has said why


@app.command(rich_help_panel=STAGES)
def register(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A draft checkpoint: config.json and model.safetensors.")],
    workload: Workload = "default",
    as_json: JsonFlag = False,
) -> None:
    """Make a draft a version in MLflow. The same bytes give the same version.

    [bold]tide register .tide/training/by-hand-20261122-101500/draft[/bold]
    """
    from tide_pipeline.registry.registry import open_registry

    config = settings_of(ctx)
    registry_of_stack(config)
    draft = open_registry(config).register(_checkpoint(config, folder), lineage={"workload": workload, "origin": "registered by hand"})
    if as_json:
        print_json(draft)
    else:
        console().print(f"{draft.draft_version} is version {draft.version} of {draft.name}\nnext: tide build --version {draft.version}")


@app.command(rich_help_panel=STAGES)
def build(
    ctx: typer.Context,
    version: Annotated[int | None, typer.Option(min=1, help="Version in MLflow.")] = None,
    draft: Annotated[Path | None, typer.Option(metavar="DIR", help="A draft folder that is not registered.")] = None,
    backend: Annotated[Backend | None, typer.Option(help="What it is for; engine.toml says so too.")] = None,
    trtllm: Annotated[str | None, typer.Option(metavar="LINE", help="Version line of TensorRT-LLM in the serving container: 1.2, 1.3 "
                                               "or 1.4.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Make an engine build of a draft: a folder that replicas load. The embedded engine warms it up once.

    For TensorRT-LLM, without --version and --draft: of the draft that the engine starts with.

    [bold]tide build --version 2[/bold]

    [bold]tide build --recipe qwen3-8b/h100 --backend trtllm --trtllm 1.3[/bold]
    """
    from tide_pipeline.build.engine import build_engine
    from tide_pipeline.build.snapshots import starting_draft
    from tide_pipeline.models.checkpoint import digest_draft
    from tide_pipeline.recipes import first_recipe
    from tide_pipeline.registry.registry import open_registry
    from tide_pipeline.registry.shipped import LABEL

    if version is not None and draft is not None:
        raise InvalidRequest("say what to build: either --version N or --draft DIR")
    config = settings_of(ctx)
    spec = load_engine_spec(config.engine_dir)
    if spec.backend == "trtllm" and not config.serve.gpu:
        config = settings_of(ctx, fresh=True, recipe=first_recipe(config.engine_dir))
    if trtllm is not None:
        config = override(config, {"serve": {"trtllm": trtllm}})
    if backend is not None and backend != spec.backend:
        raise InvalidRequest(f"engine {spec.name} is for backend {spec.backend!r}, not {backend.value!r}: name another with --engine "
                             "(`tide engines list`), or leave --backend out")
    if version is None and draft is None and spec.backend == "embedded":
        raise InvalidRequest("say what to build: either --version N or --draft DIR")
    if version is not None:
        registry_of_stack(config)
        registry = open_registry(config)
        found = registry.get(version)
        folder, name = registry.fetch(version, config.state.training / "fetched" / found.draft_version), found.draft_version
    else:
        folder = draft or starting_draft(config, spec)
        name = f"{'local' if draft else LABEL}-{digest_draft(folder)[:8]}"
    made = build_engine(config, folder, name)
    if as_json:
        print_json(made)
    else:
        facts = ", ".join(f"{key} {value:.3g}" for key, value in made.warmup.items())
        console().print(f"build {made.build_id} of {made.draft_version} ({facts or 'not warmed up: that takes its GPU'})", markup=False)
        if made.backend == "trtllm":
            console().print(f"draft lengths: {_lengths(Path(made.path))}", markup=False)
            console().print(f"for TensorRT-LLM {config.serve.trtllm} on {config.serve.gpus} x {config.serve.gpu}; the first one, in its "
                            f"container: launch_triton_server.py --model_repo={made.path}/model_repository", markup=False)
        console().print(f"next: tide gate {made.build_id}", markup=False)


@app.command(rich_help_panel=STAGES)
def gate(
    ctx: typer.Context,
    build_id: Annotated[str, typer.Argument(metavar="BUILD_ID", help="As `tide build` printed it.")],
    workload: Workload = "default",
    as_json: JsonFlag = False,
) -> None:
    """Judge a build against the draft that is served: acceptance on held-out requests, benchmark, greedy equivalence.

    Of TensorRT-LLM acceptance alone; its speed is measured on the canary. Exit code 1 when it does not pass.

    [bold]tide gate 3f2a9c0d11e8b7a4 --workload default[/bold]
    """
    from tide_pipeline.defs.adaptation import served_build
    from tide_pipeline.deployment.builds import load_build
    from tide_pipeline.gate.run import run_gate

    config, screen = settings_of(ctx), console(err=True)
    challenger = load_build(config.state.builds, config.target, build_id)
    with screen.status("acceptance") as line:
        found = run_gate(config, challenger, served_build(config, workload), workload=workload,
                         progress=lambda stage, share: line.update(f"{stage} {share:.0%}"))
    if as_json:
        print_json(found)
    else:
        print_table(("door", "", "why"), [(name, _state(door), door["reason"]) for name, door in found.verdict.doors.items()])
        console().print(f"next: tide rollout {build_id}" if found.verdict.passed else "the build stays out")
    raise typer.Exit(0 if found.verdict.passed else 1)


def _state(door: dict[str, Any]) -> str:
    from tide_pipeline.gate.judge import ELSEWHERE

    return ELSEWHERE.get(door.get("measured_on", ""), "passed" if door["passed"] else "closed")


def _lengths(build: Path) -> str:
    """Of a build for TensorRT-LLM, as its certificate says."""
    said = json.loads((build / "provenance.json").read_text()).get("draft_lengths", {"schedule": {}, "why": "one for every batch"})
    spelled = ", ".join(f"{length} up to a batch of {batch}" for batch, length in said["schedule"].items())
    return f"{spelled} ({said['why']})" if spelled else said["why"]


def _checkpoint(config: TideConfig, folder: Path) -> DraftCheckpoint:
    """What training wrote of it, wherever the folder lies now; for a draft from elsewhere only its bytes are known."""
    from tide_pipeline.contracts import DraftCheckpoint, from_dict
    from tide_pipeline.models.checkpoint import digest_draft, read_identity

    digest, file = digest_draft(folder), folder / "checkpoint.json"
    try:
        known = from_dict(DraftCheckpoint, json.loads(file.read_text()))
    except FileNotFoundError:
        return DraftCheckpoint(str(folder), digest, config.target, read_identity(folder).engine_digest, "", 0, 0.0, 0, 0, 0.0)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file} can't be read ({error}): train the draft again") from error
    return dataclasses.replace(known, path=str(folder))
