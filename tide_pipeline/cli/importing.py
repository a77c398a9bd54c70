"""tide signals import: hidden-state dumps of other systems into the lake."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tide_pipeline.cli.app import JsonFlag, console, print_json, print_table, settings_of
from tide_pipeline.cli.signals import signals
from tide_pipeline.errors import InvalidRequest

if TYPE_CHECKING:
    from tide_pipeline.capture.importing.fit import EngineShape
    from tide_pipeline.capture.importing.layers import LayerCheck
    from tide_pipeline.capture.importing.run import ImportReport, Progress
    from tide_pipeline.config import TideConfig

NAMES = ("trtllm", "modelopt", "vllm")


@signals.command("import")
def import_dumps(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the dumps lie, in it or below it.")],
    kind: Annotated[str, typer.Option("--format", help=f"Who wrote them: {', '.join(NAMES)}.")],
    workload: Annotated[str, typer.Option("--workload", help="Workload tag of the windows.")] = "default",
    tenant: Annotated[str, typer.Option("--tenant", help="Whose text it is: deletion and retention go by it.")] = "default",
    answer_after: Annotated[str, typer.Option(metavar="ID,ID", help="Token ids that stand before an answer, such as the chat template's "
                                              "assistant header. Without them and a loss mask a sequence counts as prompt.")] = "",
    temperature: Annotated[float, typer.Option(min=0.0, help="How the answers were sampled; 0 only for the target's own greedy "
                                               "ones.")] = 1.0,
    check_layers: Annotated[bool | None, typer.Option("--check-layers/--no-check-layers", help="Run the target over the first sequences "
                                                      "and compare. Default: where the engine is embedded.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Import hidden states that TensorRT-LLM (SaveHiddenStates), Model-Optimizer or vLLM (extract_hidden_states) dumped.

    Each sequence is held against the engine: hidden size, layers, vocabulary, lengths, NaN. Importing a folder again adds only what is
    new. Exit code 1 when some sequences were refused.

    [bold]tide signals import dumps/ --format vllm --workload de[/bold]
    """
    from tide_pipeline.capture.importing.run import Labels, import_folder

    if kind not in NAMES:
        raise InvalidRequest(f"--format {kind}: choose one of {', '.join(NAMES)}")
    config = settings_of(ctx)
    if tenant in config.capture.opted_out_tenants:
        raise InvalidRequest(f"tenant {tenant!r} is in capture.opted_out_tenants: nothing of theirs is stored")
    engine, layers = _engine(config, check_layers)
    with _bar(as_json) as progress:
        report = import_folder(folder, kind, config.state.signals, config.target, engine,
                               Labels(workload, tenant, _ids(answer_after), temperature), layers=layers,
                               max_rows=config.capture.shard_rows, progress=progress)
    print_json(report) if as_json else _tell(report)
    raise typer.Exit(0 if report.is_clean else 1)


def _engine(config: TideConfig, check_layers: bool | None) -> tuple[EngineShape, LayerCheck | None]:
    from tide_pipeline.capture.importing.fit import EngineShape
    from tide_pipeline.capture.importing.layers import LayerCheck
    from tide_pipeline.capture.windows import RowShape
    from tide_pipeline.engine_spec import load_engine_spec
    from tide_pipeline.models.target import engine_digest, read_shape, read_weights

    spec = load_engine_spec(config.engine_dir)
    folder = config.engine_dir / spec.model
    shape = read_shape(folder)
    norm = read_weights(folder, ("model.norm.weight",))["model.norm.weight"]
    rows = RowShape(shape.hidden_size, len(spec.capture_layers), spec.soft_targets, engine_digest(folder, spec))
    wanted = spec.backend == "embedded" if check_layers is None else check_layers
    return (EngineShape(rows, shape.vocab_size, shape.max_positions, norm, shape.eps),
            LayerCheck(folder, spec, shape.layers) if wanted else None)


@contextlib.contextmanager
def _bar(as_json: bool) -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(TextColumn("import"), BarColumn(), MofNCompleteColumn(), TextColumn("files  {task.fields[told]}"), TimeRemainingColumn(),
                  console=console(err=True), disable=as_json) as bar:
        task = bar.add_task("import", total=None, told="")

        def show(done: int, total: int, report: ImportReport) -> None:
            bar.update(task, completed=done, total=total,
                       told=f"{report.sequences} sequences, {sum(report.skipped.values())} passed over")

        yield show


def _tell(report: ImportReport) -> None:
    screen = console()
    screen.print(f"imported {report.sequences} sequences of {report.files} files: {report.rows} rows in {report.windows} windows, "
                 f"{len(report.shards)} shards", markup=False)
    if report.sequences:
        screen.print(f"{report.judged} with an answer that drafts can be judged by, the others are only trained on; {report.rounded} "
                     f"rounded to bf16; {report.normed} final states put through the target's norm", markup=False)
    if report.sequences and not report.judged:
        screen.print("training needs prompts with an answer to hold out: captured ones, or say with --answer-after where answers begin",
                     markup=False)
    if not report.layers_checked:
        screen.print("the layers were not compared with the target's: a dump of other layers looks the same", markup=False)
    if report.skipped:
        print_table(("passed over", "why", "first"), [(count, reason, report.first[reason])
                                                      for reason, count in report.skipped.most_common()])


def _ids(text: str) -> tuple[int, ...]:
    if text and not re.fullmatch(r"\d+(,\d+)*", text):
        raise InvalidRequest(f"--answer-after {text}: expected token ids, such as 128006,78191,128007")
    return tuple(int(word) for word in text.split(",")) if text else ()
