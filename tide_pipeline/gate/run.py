"""Put a challenger before the gate: measure, judge, keep the report. Knows the lake and the engine; the verdict is judge.py's.

Only held-out prompts are used: their captured windows for acceptance, themselves for the benchmark. The report holds
numbers and digests, no prompt. Of TensorRT-LLM no engine is loaded: its servers take GPUs that serve, and are timed on the canary.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tide_pipeline.capture.reader import WindowStates
from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import BenchmarkReport, EngineBuild, GateVerdict, PairedAcceptance, from_dict
from tide_pipeline.engine.text import TextCodec
from tide_pipeline.engine_spec import EngineSpec, load_engine_spec
from tide_pipeline.errors import GateNotPassed, NotEnoughSignals
from tide_pipeline.gate.bench import benchmark_builds, summarise
from tide_pipeline.gate.judge import BENCHED, judge, judge_acceptance
from tide_pipeline.gate.offline import compare, held_out_states, load_built, replay_device
from tide_pipeline.gate.remembered import Remembered
from tide_pipeline.models.eagle3 import Eagle3Draft
from tide_pipeline.provenance import write_json
from tide_pipeline.training.acceptance import replay
from tide_pipeline.training.target_head import TargetHead

CHAMPION, CHALLENGER = "champion", "challenger"

Report = Callable[[str, float], None]      # stage ("acceptance", "benchmark", "done") and its share, 0 .. 1


@dataclass(frozen=True)
class GateReport:
    """A verdict and the measurements behind it. Without a benchmark of the challenger its engine is one that the gate can't run."""

    verdict: GateVerdict
    paired: PairedAcceptance
    champion_bench: BenchmarkReport | None
    challenger_bench: BenchmarkReport | None
    workload: str
    build_id: str


def run_gate(config: TideConfig, challenger: EngineBuild, champion: EngineBuild | None, *, workload: str,
             focus_since: float = 0.0, replays: Path | None = None, progress: Report = lambda stage, share: None) -> GateReport:
    """Judge `challenger` against `champion` (None: against no speculation) and save the report, whatever the verdict.

    Windows of the workload from before `focus_since` are judged as a workload of their own: they must not lose either.
    `replays`: where gate/remembered.py keeps what the champion does on them.

    Raises:
        NotEnoughSignals: no held-out requests of the workload to judge on.
        CheckpointError, EngineMismatch, BuildError: a draft can't be loaded on this engine.
    """
    torch.set_num_threads(config.serve.threads)
    progress("acceptance", 0.0)
    head, states = held_out_states(config, workload, focus_since=focus_since)
    paired = _offline(config, head.to(replay_device(config, challenger.backend)), states, challenger, champion, workload, replays)
    benches: dict[str, BenchmarkReport] = {}
    if challenger.backend in BENCHED:
        benches = _benchmark(config, states, challenger, champion, workload, progress)
        verdict = judge(paired=paired, champion=benches.get(CHAMPION), challenger=benches[CHALLENGER], settings=config.gate,
                        challenger_digest=challenger.draft_digest, workload=workload)
    else:
        verdict = judge_acceptance(paired=paired, champion=champion, challenger=challenger, settings=config.gate, workload=workload)
    report = GateReport(verdict, paired, benches.get(CHAMPION), benches.get(CHALLENGER), workload, challenger.build_id)
    write_json(report_file(config, challenger.build_id), dataclasses.asdict(report))
    progress("done", 1.0)
    return report


def load_report(config: TideConfig, build_id: str) -> GateReport:
    """Raises GateNotPassed when the build never came before the gate."""
    file = report_file(config, build_id)
    try:
        found = json.loads(file.read_text())
        old, new = (from_dict(BenchmarkReport, bench) if bench else None for bench in (found["champion_bench"], found["challenger_bench"]))
        return GateReport(from_dict(GateVerdict, found["verdict"]), from_dict(PairedAcceptance, found["paired"]), old, new,
                          found["workload"], found["build_id"])
    except FileNotFoundError as error:
        raise GateNotPassed(f"build {build_id} has no gate report: run `tide gate` first") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise GateNotPassed(f"{file} can't be read ({error}): run `tide gate` again") from error


def load_verdict(config: TideConfig, build_id: str) -> GateVerdict:
    """The last verdict on a build. Raises GateNotPassed when there is none."""
    return load_report(config, build_id).verdict


def report_file(config: TideConfig, build_id: str) -> Path:
    return config.state.reports / "gate" / f"{build_id}.json"


def _benchmark(config: TideConfig, states: Sequence[WindowStates], challenger: EngineBuild, champion: EngineBuild | None, workload: str,
               progress: Report) -> dict[str, BenchmarkReport]:
    """Both in one engine of this process, by tag. Raises NotEnoughSignals, BuildError."""
    spec = load_engine_spec(config.engine_dir)
    builds = {CHALLENGER: challenger} | ({CHAMPION: champion} if champion else {})
    bench = benchmark_builds(config.engine_dir / spec.model, spec, builds, bench_prompts(config, spec, states, workload), config.gate,
                             config.speculation, dataclasses.replace(config.serve, max_batch=1), timed=config.gate.bench_prompts,
                             checked=(CHALLENGER,), progress=lambda done, total: progress("benchmark", done / total))
    return {tag: summarise(bench, tag, build, CHAMPION if champion and tag == CHALLENGER else "") for tag, build in builds.items()}


def bench_prompts(config: TideConfig, spec: EngineSpec, states: Sequence[WindowStates], workload: str) -> list[str]:
    """Held-out prompts of the workload, newest first, each once, that leave room for the output.

    Raises:
        NotEnoughSignals: not a single one.
    """
    codec = TextCodec(config.engine_dir / spec.model)
    room = spec.max_context - config.gate.bench_tokens
    wanted = max(config.gate.bench_prompts, config.gate.equivalence_prompts)
    prompts: dict[str, str] = {}
    for state in sorted(states, key=lambda s: s.window.closed_at, reverse=True):
        window = state.window
        if window.workload != workload or window.start_pos or not 0 < window.num_prompt_tokens <= min(window.num_rows, room):
            continue
        text = codec.decode(state.token_ids[: window.num_prompt_tokens].tolist())
        if text and len(codec.encode(text)) <= room:
            prompts.setdefault(window.prompt_digest, text)
    if not prompts:
        raise NotEnoughSignals(f"no held-out request of workload {workload!r} was captured from its first token with a prompt of at most "
                               f"{room} tokens: capture more of it before judging a draft")
    return list(prompts.values())[:wanted]


def _offline(config: TideConfig, head: TargetHead, states: Sequence[WindowStates], challenger: EngineBuild, champion: EngineBuild | None,
             workload: str, replays: Path | None) -> PairedAcceptance:
    new, length = load_built(head, challenger), config.gate.draft_length
    if champion:
        known = Remembered.open(replays, champion.draft_digest, head.digest, length)
        before = known.replay(lambda: load_built(head, champion), head, states)
    else:
        before = list(replay(_silent(new), head, states, length))
    return compare(before, replay(new, head, states, length), config.gate, workload)


def _silent(draft: Eagle3Draft) -> Eagle3Draft:
    """No champion: a draft that proposes its first token for ever, which is as good as none."""
    silent = copy.deepcopy(draft)
    with torch.no_grad():
        silent.lm_head.weight.zero_()
    return silent
