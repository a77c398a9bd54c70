"""Savings against the static draft where all parts are real: an engine serves with a bad draft, then with a good one; both are replayed."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path

import pytest

from tests.fakes_rollout import write_engine
from tests.helpers import agreeing_draft, ask, generate, random_draft, tiny_engine, tiny_spec, write_tiny_build
from tide_pipeline.build.engine import build_engine
from tide_pipeline.capture.recorder import Recorder
from tide_pipeline.config import CaptureSettings, TideConfig, override
from tide_pipeline.contracts import ANY_WORKLOAD, Deployment, EngineBuild
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.models.eagle3 import Eagle3Draft
from tide_pipeline.models.target import Target
from tide_pipeline.provenance import write_json
from tide_pipeline.report.page import render
from tide_pipeline.report.period import collect
from tide_pipeline.report.savings import NONE, STATIC

PROMPTS = 24


def build(config: TideConfig, target: Target, folder: Path, version: str, draft: Eagle3Draft) -> EngineBuild:
    saved = write_tiny_build(folder / version, target, draft)
    certificate = Path(saved.path) / "draft" / "provenance.json"
    certificate.write_text(json.dumps({**json.loads(certificate.read_text()), "created_at": time.time(), "train_s": 1.0,
                                       "workload": "default"}))
    return build_engine(config, Path(saved.path) / "draft", version, warm_up=False)


def serve(config: TideConfig, tiny_dir: Path, served: EngineBuild) -> None:
    recorder = Recorder(CaptureSettings(mode="on"), "tiny", config.state.lake, "replica-0")
    engine = tiny_engine(tiny_dir, sink=recorder, spec=tiny_spec(), drafts=served)
    for mode in ("3", "off"):
        generate(engine, *(ask(f"{served.draft_version}-{mode}-{i}", f"secret words number {i}", speculation=mode, max_tokens=24,
                               ignore_eos=True) for i in range(PROMPTS)))
    engine.close()


def deploy(config: TideConfig, n: int, served: EngineBuild) -> None:
    DeploymentRecord(config.state.deployments, config.target).append(
        Deployment(n, config.target, {"rest": {ANY_WORKLOAD: served.build_id}}, (), "stable", "tests", "test"))


def test_a_better_draft_is_worth_what_the_replay_says(tmp_path: Path, tiny_dir: Path, tiny_target: Target) -> None:
    config = override(write_engine(tmp_path, tiny_dir), {"training": {"eval_share": 0.5}})
    began = time.time()
    first = build(config, tiny_target, tmp_path, "v1", random_draft(tiny_target))
    deploy(config, 1, first)
    serve(config, tiny_dir, first)
    second = build(config, tiny_target, tmp_path, "v2", agreeing_draft(tiny_target))
    deploy(config, 2, second)
    serve(config, tiny_dir, second)

    data = collect(config, began)
    found = data.savings
    assert found is not None and found.static_version == "v1" and found.training_s == 0.0      # no curve: nothing was trained here
    against = {a.name: a for a in found.against}
    assert set(against) == {NONE, STATIC} and against[STATIC].judged_share == pytest.approx(1.0)
    (replayed,) = found.replays
    assert replayed.draft_version == "v2" and 4 <= replayed.prompts < PROMPTS and replayed.windows == replayed.prompts
    assert replayed.served_length > replayed.static_length + 0.3
    rest = found.served_s - against[STATIC].seconds.estimate + against[STATIC].saved_s.estimate
    assert rest == pytest.approx(0.0, abs=1e-6)
    assert against[STATIC].saved_s.estimate >= -1e-6
    assert "faster than static" in render(data)

    folder = config.state.training / "run-1"               # a build that went after a week: its draft is where it was trained
    shutil.copytree(Path(second.path) / "draft", folder / "draft")
    write_json(folder / "draft" / "checkpoint.json", {"digest": second.draft_digest, "target": config.target})
    write_json(folder / "build.json", dataclasses.asdict(second))
    shutil.rmtree(second.path)
    again = collect(config, began, data.until).savings
    assert again is not None and again.replays == found.replays


def test_without_captured_windows_the_static_draft_is_not_judged(tmp_path: Path, tiny_dir: Path, tiny_target: Target) -> None:
    config = write_engine(tmp_path, tiny_dir)
    began = time.time()
    first = build(config, tiny_target, tmp_path, "v1", random_draft(tiny_target))
    second = build(config, tiny_target, tmp_path, "v2", agreeing_draft(tiny_target))
    deploy(config, 1, first)
    deploy(config, 2, second)
    recorder = Recorder(CaptureSettings(mode="off"), "tiny", config.state.lake, "replica-0")
    engine = tiny_engine(tiny_dir, sink=recorder, spec=tiny_spec(), drafts=second)
    generate(engine, *(ask(f"r{i}", f"words {i}", speculation="3", max_tokens=24, ignore_eos=True) for i in range(8)))
    engine.close()
    found = collect(config, began).savings
    assert found is not None and STATIC not in {a.name for a in found.against} and not found.replays
