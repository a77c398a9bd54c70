"""tide traffic: prompts of a file or of shipped domains, over HTTP to the stack that is up."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tide_pipeline.cli.app import STAGES, JsonFlag, Workload, app, console, orderly, print_json, settings_of, stack_of
from tide_pipeline.errors import InvalidRequest
from tide_pipeline.workloads.scenarios import Shape

if TYPE_CHECKING:
    from tide_pipeline.contracts import GenerationRequest
    from tide_pipeline.serve.client import GenerationResult, TritonClient
    from tide_pipeline.stack.traffic import Traffic
    from tide_pipeline.workloads.prompts import Prompt

SHOW_EVERY_S = 0.5
LINE_EVERY_S = 10.0                # where no terminal is attached
PROMPTS_HELP = 'One {"prompt": "..."} a line; "tenant", "workload", "max_tokens" and "temperature" may stand beside it.'
SCENARIO_HELP = "How traffic changes: not at all, at once in the middle, bit by bit, or in turn and back again, each domain twice."


@dataclass
class Tally:
    """What came back, in all. Stands in for the client that `Traffic` calls."""

    client: TritonClient
    answers: int = 0
    output_tokens: int = 0
    accepted: int = 0
    verify_steps: int = 0
    target_steps: int = 0
    versions: Counter[str] = field(default_factory=Counter)
    began: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def generate(self, request: GenerationRequest) -> GenerationResult:
        result = self.client.generate(request)
        with self._lock:
            self.answers += 1
            self.output_tokens += result.num_output_tokens
            self.accepted += result.accepted
            self.verify_steps += result.verify_steps
            self.target_steps += result.target_steps
            self.versions[result.draft_version or "none"] += 1
        return result

    def as_dict(self) -> dict[str, Any]:
        """`acceptance_length`: tokens per step that verified a draft; `tokens_per_step`: over all steps."""
        seconds = time.monotonic() - self.began
        return {"finished": self.answers, "output_tokens": self.output_tokens, "seconds": round(seconds, 2),
                "tokens_per_s": round(self.output_tokens / max(seconds, 1e-9), 1),
                "acceptance_length": round(1 + self.accepted / self.verify_steps, 3) if self.verify_steps else None,
                "tokens_per_step": round(self.output_tokens / self.target_steps, 3) if self.target_steps else None,
                "draft_versions": dict(self.versions)}


@dataclass
class Fitter:
    """Cuts prompts that would not fit, from the left: what stands last matters most for what comes next."""

    engine_dir: Path
    cut: int = 0

    def __post_init__(self) -> None:
        from tide_pipeline.engine.text import TextCodec
        from tide_pipeline.engine_spec import load_engine_spec

        spec = load_engine_spec(self.engine_dir)
        self.max_context = spec.max_context
        self._tokenizer = TextCodec(self.engine_dir / spec.model).tokenizer

    def fit(self, text: str, max_tokens: int) -> str:
        """Raises InvalidRequest when the answer alone fills the context."""
        room = self.max_context - max_tokens
        if room < 1:
            raise InvalidRequest(f"--max-tokens {max_tokens} leaves no room for a prompt in a context of {self.max_context} tokens")
        if len(text.encode()) <= room:                     # a token is a byte at least
            return text
        kept = text
        while (encoded := self._tokenizer.encode(kept)) and len(encoded.ids) > room:
            kept = kept[max(1, encoded.offsets[len(encoded.ids) - room][0]):]
        self.cut += kept != text
        return kept


@app.command(rich_help_panel=STAGES)
def traffic(
    ctx: typer.Context,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help=PROMPTS_HELP)] = None,
    domain: Annotated[str | None, typer.Option(metavar="NAME", help="Prompts that ship with the engine, such as en, de, py.")] = None,
    scenario: Annotated[Shape, typer.Option(help=SCENARIO_HELP)] = Shape.STEADY,
    to: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Shipped domain that traffic changes to; "
                                                 "recurring traffic takes several: repeat the option.")] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="How many to send, and how long a scenario is; prompts are used again when "
                                                 "they run out. Default: as many as there are prompts.")] = None,
    repeat: Annotated[bool, typer.Option("--repeat", help="Go on until Ctrl-C: as the scenario ended; recurring goes round.")] = False,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 8,
    speculation: Annotated[str, typer.Option(help="auto, off, or a fixed draft length.")] = "auto",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 96,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    workload: Workload = "default",
    tenant: Annotated[str, typer.Option(help="Whose requests these are.")] = "default",
    as_json: JsonFlag = False,
) -> None:
    """Send prompts to the running stack and watch acceptance and throughput.

    Prompts that are too long lose their beginning. Exit code 1 when a request failed.

    [bold]tide traffic --prompts my.jsonl --repeat[/bold]   watch the system adapt to your own text

    [bold]tide traffic --domain en --scenario gradual --to html --requests 240[/bold]   from one domain to another, bit by bit
    """
    from tide_pipeline.serve.client import TritonClient
    from tide_pipeline.stack.traffic import Traffic, TrafficDefaults
    from tide_pipeline.workloads.scenarios import draw, scenario_of

    if (prompts is None) == (domain is None):
        raise InvalidRequest("say what to send: either --prompts FILE.jsonl or --domain NAME")
    play = scenario_of(scenario, [domain or str(prompts), *(to or [])])
    config = settings_of(ctx)
    stack = stack_of(config)
    found = _load(config.engine_dir, prompts, [*([domain] if domain else []), *(to or [])])
    fitter = Fitter(config.engine_dir)
    length = requests or sum(map(len, found.values()))
    count = None if repeat and requests is None else length
    fitted = {name: [dataclasses.replace(p, text=fitter.fit(p.text, p.max_tokens or max_tokens)) for p in several[:count]]
              for name, several in found.items()}
    tally = Tally(TritonClient(stack.triton_url, config.target))
    sender = Traffic(tally, itertools.islice(draw(play, fitted, length), count), concurrency,       # type: ignore[arg-type]
                     TrafficDefaults(max_tokens, temperature, speculation, workload, tenant)).start()
    with orderly():
        _watch(sender, tally, count, quiet=as_json)
    stats = sender.stop()
    result = {"requests": stats.sent, "failed": stats.failed, "truncated": fitter.cut, **tally.as_dict(), "last_error": stats.last_error}
    if as_json:
        print_json(result)
    else:
        _print_result(result)
    raise typer.Exit(1 if stats.failed else 0)


def _load(engine_dir: Path, file: Path | None, domains: list[str]) -> dict[str, list[Prompt]]:
    """What is sent, by the name that the scenario knows it by."""
    from tide_pipeline.workloads.prompts import domain_prompts, load_prompts

    return ({str(file): load_prompts(file)} if file else {}) | {name: domain_prompts(engine_dir, name) for name in domains}


def _watch(sender: Traffic, tally: Tally, count: int | None, *, quiet: bool) -> None:
    """Until all is answered or Ctrl-C."""
    from rich.live import Live

    screen, told = console(err=True), time.monotonic()
    try:
        with Live(console=screen, transient=True, refresh_per_second=4) if screen.is_terminal and not quiet else _Silent() as view:
            while sender.running:
                time.sleep(SHOW_EVERY_S)
                view.update(_line(sender, tally, count))
                if not quiet and not screen.is_terminal and time.monotonic() - told > LINE_EVERY_S:
                    told = time.monotonic()
                    screen.print(_line(sender, tally, count))
    except KeyboardInterrupt:
        screen.print("waiting for the answers in flight")


class _Silent:
    """A view that shows nothing."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, line: str) -> None: ...


def _line(sender: Traffic, tally: Tally, count: int | None) -> str:
    s = sender.stats()
    failed = f"  [red]{s.failed} failed: {s.last_error[:60]}[/red]" if s.failed else ""
    return (f"{s.finished}{f' of {count}' if count else ''} answered  acceptance length [bold]{s.acceptance_length:.2f}[/bold]  "
            f"[bold]{s.tokens_per_s:.0f}[/bold] tokens/s  draft {next(reversed(tally.versions), '-')}{failed}")


def _print_result(result: dict[str, Any]) -> None:
    screen, length = console(), result["acceptance_length"]
    screen.print(f"{result['finished']} answered, {result['failed']} failed, {result['output_tokens']:,} tokens "
                 f"in {result['seconds']:.0f} s: "
                 f"{result['tokens_per_s']:.0f} tokens/s, acceptance length {f'{length:.2f}' if length else '- (nothing drafted)'}, "
                 f"drafts {', '.join(f'{name} ({n})' for name, n in result['draft_versions'].items()) or 'none'}")
    if result["truncated"]:
        screen.print(f"[yellow]{result['truncated']} prompts were too long for the engine's context and lost their beginning[/yellow]")
    if result["last_error"]:
        screen.print(f"last error: {result['last_error']}", markup=False)
