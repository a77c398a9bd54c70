"""The whole gate on a tiny engine: traffic is captured, two drafts are built, measured and judged, the report is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fakes_rollout import write_engine
from tests.helpers import agreeing_draft, ask, generate, random_draft, tiny_engine, tiny_spec, write_tiny_build
from tide_pipeline.build.engine import build_engine
from tide_pipeline.capture.recorder import Recorder
from tide_pipeline.capture.windows import prompt_digest
from tide_pipeline.config import CaptureSettings, TideConfig, override
from tide_pipeline.contracts import EngineBuild
from tide_pipeline.engine.text import TextCodec
from tide_pipeline.errors import GateNotPassed, NotEnoughSignals
from tide_pipeline.gate.offline import held_out_states
from tide_pipeline.gate.remembered import remember
from tide_pipeline.gate.run import bench_prompts, load_report, load_verdict, run_gate
from tide_pipeline.models.eagle3 import Eagle3Draft
from tide_pipeline.models.target import Target
from tide_pipeline.training.data import is_held_out

REPEATS = 3                                            # every prompt is asked so often, under other ids
PROMPT = "secret words number {i} in {tag}"
GATE = {"bench_prompts": 4, "bench_tokens": 16, "equivalence_prompts": 5, "bootstrap": 100, "min_prompts": 4,
        "min_speedup_ratio": 0.01}                     # a tiny target gains nothing by speculation


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path, tiny_target: Target) -> TideConfig:
    """An engine whose lake holds 24 prompts of two workloads, half of them held out."""
    config = write_engine(tmp_path_factory.mktemp("gate"), tiny_dir)
    config = override(config, {"gate": GATE, "training": {"eval_share": 0.5}})
    recorder = Recorder(CaptureSettings(mode="on"), "tiny", config.state.lake, "replica-0")
    engine = tiny_engine(tiny_dir, sink=recorder, spec=tiny_spec())
    for tag in ("de", "py"):
        for n in range(REPEATS):
            generate(engine, *(ask(f"{tag}-{i}-{n}", PROMPT.format(i=i, tag=tag), workload=tag, max_tokens=24, ignore_eos=True)
                               for i in range(24)))
    engine.close()
    return config


@pytest.fixture(scope="module")
def drafts(config: TideConfig, tmp_path_factory: pytest.TempPathFactory, tiny_target: Target) -> dict[str, EngineBuild]:
    def build(name: str, draft: Eagle3Draft) -> EngineBuild:
        saved = write_tiny_build(tmp_path_factory.mktemp(name), tiny_target, draft)
        return build_engine(config, Path(saved.path) / "draft", name, warm_up=False)

    return {"good": build("good", agreeing_draft(tiny_target)), "bad": build("bad", random_draft(tiny_target))}


def held_out_prompts(config: TideConfig, tag: str) -> set[str]:
    """What must be held out, from the text alone."""
    codec = TextCodec(config.engine_dir / tiny_spec().model)
    texts = (PROMPT.format(i=i, tag=tag) for i in range(24))
    return {text for text in texts if is_held_out(prompt_digest(codec.encode(text)), 0.5)}


def test_the_better_draft_passes_and_its_report_is_kept(config: TideConfig, drafts: dict[str, EngineBuild]) -> None:
    stages: list[tuple[str, float]] = []
    report = run_gate(config, drafts["good"], drafts["bad"], workload="de", progress=lambda stage, share: stages.append((stage, share)))
    verdict = report.verdict
    assert verdict.passed, verdict.reasons
    assert (verdict.champion, verdict.challenger, verdict.challenger_digest) == ("bad", "good", drafts["good"].draft_digest)
    assert set(report.paired.by_workload) == {"de", "py"} and report.paired.gain_low > 0.05
    assert report.paired.prompts == len(held_out_prompts(config, "de")), "not the requests that repeat them"
    assert report.champion_bench is not None and report.champion_bench.prompts == report.challenger_bench.prompts == 4, "these are timed"
    assert report.challenger_bench.compared_tokens == 5 * 16 and not report.champion_bench.compared_tokens, "the fifth is checked alone"
    assert 0 < report.challenger_bench.over_champion[1] <= verdict.doors["benchmark"]["ratio"] == report.challenger_bench.over_champion[0]
    assert stages[0] == ("acceptance", 0.0) and ("benchmark", 1.0) in stages and stages[-1] == ("done", 1.0)
    assert load_report(config, drafts["good"].build_id) == report and load_verdict(config, drafts["good"].build_id) == verdict

    kept = (config.state.reports / "gate" / f"{drafts['good'].build_id}.json").read_text()
    assert "secret" not in kept and json.loads(kept)["workload"] == "de"


def test_the_worse_draft_is_refused_with_its_numbers(config: TideConfig, drafts: dict[str, EngineBuild]) -> None:
    verdict = run_gate(config, drafts["bad"], drafts["good"], workload="de").verdict
    assert not verdict.passed and not verdict.doors["offline"]["passed"] and "py -" in verdict.doors["offline"]["reason"]
    assert verdict.doors["equivalence"]["passed"], "a bad draft is slow, never wrong"
    assert not load_verdict(config, drafts["bad"].build_id).passed, "refused verdicts are kept too"


def test_a_champion_replayed_before_has_the_same_numbers(config: TideConfig, drafts: dict[str, EngineBuild], tmp_path: Path) -> None:
    file = tmp_path / "replays.json"
    assert remember(config, drafts["bad"], file, workload="de") > 20 and remember(config, drafts["bad"], file, workload="de") == 0
    fresh = run_gate(config, drafts["good"], drafts["bad"], workload="de")
    assert run_gate(config, drafts["good"], drafts["bad"], workload="de", replays=file).paired == fresh.paired
    known = json.loads(file.read_text())
    file.write_text(json.dumps(known | {"walks": {name: [1.0, [1.0, 1.0, 1.0]] for name in known["walks"]}}))
    assert run_gate(config, drafts["good"], drafts["bad"], workload="de", replays=file).paired.champion == 4.0, "it is read"


def test_the_first_draft_is_judged_against_no_speculation(config: TideConfig, drafts: dict[str, EngineBuild]) -> None:
    report = run_gate(config, drafts["good"], None, workload="de")
    assert report.champion_bench is None and report.verdict.champion == "" and report.verdict.passed, report.verdict.reasons
    assert report.paired.champion < 1.2 < report.paired.challenger


def test_held_out_prompts_are_benchmarked_once_each(config: TideConfig) -> None:
    _, states = held_out_states(config, "de")
    prompts = bench_prompts(config, tiny_spec(), states, "de")
    assert len(prompts) == len(set(prompts)) == 5 and set(prompts) < held_out_prompts(config, "de")
    with pytest.raises(NotEnoughSignals, match="prompt of at most 8 tokens"):
        bench_prompts(override(config, {"gate": {"bench_tokens": 88}}), tiny_spec(), states, "de")


def test_what_never_came_before_the_gate_has_no_verdict(config: TideConfig, drafts: dict[str, EngineBuild]) -> None:
    with pytest.raises(GateNotPassed, match="run `tide gate` first"):
        load_verdict(config, "0" * 16)
    file = config.state.reports / "gate" / "abc.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('{"verdict": {}}')
    with pytest.raises(GateNotPassed, match="run `tide gate` again"):
        load_verdict(config, "abc")
    with pytest.raises(NotEnoughSignals, match="html"):
        run_gate(config, drafts["good"], None, workload="html")
