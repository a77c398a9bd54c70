"""A demo run as it would be found on disk: healthy, shifted, adapting, adapted. Made up, written through the real parts."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from pathlib import Path
from typing import Any

from tests.fakes_drift import deploy, traffic, write_build, write_log
from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import BenchmarkReport, EngineBuild, GateVerdict, PairedAcceptance
from tide_pipeline.provenance import write_json

OLD, NEW = "shipped-5f31c0de", "v2-1f0a9c2b"


def demo_state(config: TideConfig, now: float) -> float:
    """Write 5 minutes of a run that ended at `now`; when it began."""
    began, rng = now - 300.0, random.Random(7)
    old, new = write_build(config, "a" * 16, OLD), write_build(config, "b" * 16, NEW)
    _made_at(old, began - 60), _made_at(new, now - 100)
    rows = [*traffic(rng, began, now - 240, 0.78, draft_version=OLD, requests_per_s=3),
            *traffic(rng, now - 240, now - 225, 0.36, draft_version=OLD, requests_per_s=3),
            *traffic(rng, now - 225, now - 92, 0.36, draft_version=OLD, requests_per_s=2.5, drafted_share=0.03),
            *traffic(rng, now - 92, now, 0.71, draft_version=NEW, requests_per_s=3),
            *traffic(rng, began, now, 0.0, draft_version="", requests_per_s=0.4, drafted_share=0.0, workload="off")]
    write_log(config, [dataclasses.replace(row, workload="default", duration_ms=2500.0) for row in rows])
    curve = [{"step": 0, "elapsed_s": 0.0, "acceptance_length": 1.55}]
    for second in range(1, 76):
        curve.append({"step": 4 * second, "elapsed_s": float(second), "loss": 2.1 + 6.0 * 0.94**second + rng.gauss(0, 0.08)})
        if second % 10 == 0:
            curve.append({"step": 4 * second, "elapsed_s": float(second), "acceptance_length": 2.75 - 1.2 * 0.95**second})
    (Path(new.path) / "draft").mkdir()
    (Path(new.path) / "draft" / "provenance.json").write_text(json.dumps({
        "created_at": now - 105, "train_s": 75.0, "curve": curve, "workload": "default", "focus_since": now - 235, "digest": "d" * 64,
        "rows": 21_000, "start_acceptance_length": 1.55, "acceptance_length": 2.69}))
    run = config.state.training / "run-1"
    write_json(run / "request.json", {"workload": "default", "reason": "drop 0.42 (0.40 to 0.44)", "focus_since": now - 235})
    write_json(run / "draft" / "checkpoint.json", {"digest": "d" * 64})
    deploy(config, {"*": old.build_id}, began - 50, reason="first deployment")
    deploy(config, {"*": new.build_id}, now - 92, reason="gate passed: acceptance length 1.55 to 2.69")
    write_gate(config, new, now - 95)
    return began


def write_gate(config: TideConfig, build: EngineBuild, at: float) -> None:
    """A gate report with a passing verdict."""
    doors: dict[str, dict[str, Any]] = {
        "offline": {"passed": True, "reason": "acceptance length 1.55 to 2.69, gain +1.14 [+1.05, +1.22] over 31 requests, at least 0.05"},
        "benchmark": {"passed": True, "reason": "402 tokens/s against 251 with champion, ratio 1.61 [1.48, 1.74], not below 1.00"},
        "equivalence": {"passed": True, "reason": "0 of 768 greedy tokens differ from plain decoding, 2 ties"}}
    verdict = GateVerdict(True, doors, OLD, build.draft_version, build.draft_digest)
    bench = BenchmarkReport(build.build_id, build.draft_version, 2.69, 402.0, 248.0, 1.61, 1.48, 1.74, 9.0, 8, 768, 2, 0)
    file = config.state.reports / "gate" / f"{build.build_id}.json"
    write_json(file, {
        "verdict": dataclasses.asdict(verdict), "paired": dataclasses.asdict(PairedAcceptance(1.55, 2.69, 1.14, 1.05, 1.22, 31, 6200)),
        "champion_bench": None, "challenger_bench": dataclasses.asdict(bench), "workload": "default", "build_id": build.build_id})
    os.utime(file, (at, at))


def phases() -> list[dict[str, Any]]:
    """As `tide demo` measures them."""
    return [_phase("healthy", 2.74, 1.72, 1.66), _phase("shifted", 1.55, 0.99, 0.93), _phase("adapted", 2.61, 1.63, 1.58)]


def _phase(name: str, length: float, speedup: float, fixed: float) -> dict[str, Any]:
    def row(name: str, text: str, prompts: int, gain: float) -> dict[str, Any]:
        return {"name": name, "text": text, "prompts": prompts, "acceptance_length": length + gain, "tokens_per_s": 248 * (speedup + gain),
                "plain_tokens_per_s": 248.0, "speedup": speedup + gain, "speedup_low": speedup + gain - 0.06,
                "speedup_high": speedup + gain + 0.07, "speedup_fixed": fixed + gain}

    splits = [row("greedy, all", "", 18, 0.08), row("greedy, non-looping", "", 14, 0.0), row("greedy, looping", "", 4, 0.31),
              row("temperature 0.8, all", "", 6, -0.05)]
    return {**row(name, "greedy, non-looping", 14, 0.0), "splits": splits}


def _made_at(build: EngineBuild, at: float) -> None:
    file = Path(build.path) / "build.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "created_at": at}))
