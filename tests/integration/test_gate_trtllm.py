"""The gate of TensorRT-LLM's builds: acceptance alone decides, no engine is loaded, and what is left to the canary is said.

The windows are real, captured by the embedded engine under the name of a target that TensorRT-LLM serves. Then the target's layers are
taken away, as of a network that we could not run anyway: the gate has its two matrices and the numbers in engine.toml.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from tests.gpu_engines import small_config, write_gpu_engine
from tests.helpers import agreeing_draft, ask, generate, random_draft, tiny_engine, write_tiny_build, write_tiny_target
from tide_pipeline.build.engine import build_engine
from tide_pipeline.capture.recorder import Recorder
from tide_pipeline.cli import app
from tide_pipeline.config import CaptureSettings, TideConfig, override
from tide_pipeline.contracts import EngineBuild
from tide_pipeline.defs.promotion import timed
from tide_pipeline.engine_spec import load_engine_spec
from tide_pipeline.errors import CheckpointError, GateNotPassed
from tide_pipeline.gate.offline import replay_device
from tide_pipeline.gate.run import load_report, run_gate
from tide_pipeline.models.eagle3 import Eagle3Draft
from tide_pipeline.models.target import Target
from tide_pipeline.report.page import _gates as gates_section
from tide_pipeline.rollout.promote import check_verdict

TINY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 48, "vocab_size": 257, "max_position_embeddings": 256, "rope_theta": 1e4, "rms_norm_eps": 1e-5}
Made = tuple[TideConfig, dict[str, EngineBuild]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An engine for TensorRT-LLM 1.3 whose lake holds 24 prompts, half of them held out; a good build, and a bad one."""
    root = tmp_path_factory.mktemp("gate-trtllm")
    engine_dir = write_gpu_engine(root / "engines", {"architecture": TINY, "capture_layers": [0, 1, 2], "max_context": 96, "draft": None})
    target = write_tiny_target(engine_dir / "target")
    config = override(small_config(engine_dir, root / "state", trtllm="1.3"),
                      {"gate": {"bootstrap": 100, "min_prompts": 4}, "training": {"eval_share": 0.5}})
    spec = load_engine_spec(engine_dir)
    engine = tiny_engine(target, spec=spec, sink=Recorder(CaptureSettings(mode="on"), "small", config.state.lake, "replica-0"))
    generate(engine, *(ask(f"de-{i}", f"some words, number {i}", workload="de", max_tokens=24, ignore_eos=True) for i in range(24)))
    engine.close()

    def build(name: str, draft: Eagle3Draft) -> EngineBuild:
        return build_engine(config, Path(write_tiny_build(root / name, network, draft).path) / "draft", name)

    network = Target(target, spec)
    builds = {"good": build("good", agreeing_draft(network)), "bad": build("bad", random_draft(network))}
    weights = load_file(target / "model.safetensors")
    save_file({name: weights[name] for name in ("model.embed_tokens.weight", "lm_head.weight")}, target / "model.safetensors")
    with pytest.raises(CheckpointError):
        Target(target, spec)
    return config, builds


def test_acceptance_opens_the_gate_and_the_canary_is_left_the_rest(made: Made) -> None:
    config, builds = made
    stages: list[str] = []
    report = run_gate(config, builds["good"], builds["bad"], workload="de", progress=lambda stage, share: stages.append(stage))
    verdict = report.verdict
    assert verdict.passed and verdict.deferred == ("benchmark",), verdict.reasons
    assert "timed on the canary" in verdict.reasons and "equivalence: not measured" in verdict.reasons
    assert (verdict.champion, verdict.challenger, verdict.challenger_digest) == ("bad", "good", builds["good"].draft_digest)
    assert report.challenger_bench is report.champion_bench is None and stages == ["acceptance", "done"]
    assert report.paired.gain_low > 0.05 and verdict.doors["offline"]["challenger_first_position"] > 0.3
    assert load_report(config, builds["good"].build_id) == report
    assert set(timed(report)) == {"not_measured_here"}, "an asset's metadata"
    assert all(words in gates_section([verdict]) for words in ("on the canary", "not asked")), "the report page"
    check_verdict(config, builds["good"], verdict)


def test_acceptance_refuses_too(made: Made) -> None:
    config, builds = made
    verdict = run_gate(config, builds["bad"], builds["good"], workload="de").verdict
    assert not verdict.passed and not verdict.doors["offline"]["passed"]
    with pytest.raises(GateNotPassed, match="did not pass the gate \\(offline\\)"):
        check_verdict(config, builds["bad"], verdict)


def tide_gate(config: TideConfig, build: EngineBuild, *words: str) -> Result:
    sets = [f"engines_dir={config.engines_dir}", "gate.min_prompts=4", "gate.bootstrap=100", "training.eval_share=0.5", "serve.gpu=h100"]
    return CliRunner().invoke(app, ["gate", build.build_id, "--workload", "de", "--engine", "small", "--state", str(config.state.root),
                                    *words, *(word for value in sets for word in ("--set", value))])


def test_by_hand_it_says_what_was_not_asked_here(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    config, builds = made
    monkeypatch.delenv("TIDE_CONFIG", raising=False)
    monkeypatch.setenv("TIDE_PROJECT_ROOT", str(Path(config.engines_dir).parent))
    done = tide_gate(config, builds["good"])
    assert done.exit_code == 0, done.stderr
    assert "on the canary" in done.stdout and "not asked" in done.stdout and "next: tide rollout" in done.stdout
    found = json.loads(tide_gate(config, builds["good"], "--json").stdout)
    assert found["challenger_bench"] is None and found["verdict"]["doors"]["benchmark"]["measured_on"] == "canary"


def test_drafts_are_replayed_on_the_training_gpu_where_there_is_one(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    config = override(made[0], {"training": {"device": "cuda:1"}})
    assert replay_device(config, "trtllm") == replay_device(made[0], "trtllm") == "cpu", "none here"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [replay_device(config, backend) for backend in ("trtllm", "embedded")] == ["cuda:1", "cpu"]
    assert replay_device(made[0], "trtllm") == "cpu"
    assert replay_device(override(config, {"training": {"train_devices": ["cuda:0", "cuda:1"]}}), "trtllm") == "cuda:0"
