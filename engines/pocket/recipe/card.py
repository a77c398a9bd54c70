"""Measure the finished target and champion, and write the model card (README.md beside engine.toml)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tide_pipeline.config import GateSettings, SpeculationSettings
from tide_pipeline.contracts import EngineBuild
from tide_pipeline.engine_spec import load_engine_spec
from tide_pipeline.gate.bench import PLAIN, acceptance_length, benchmark_builds
from tide_pipeline.models.checkpoint import digest_draft
from tide_pipeline.models.target import engine_digest
from tide_pipeline.workloads.loops import is_looping
from tide_pipeline.workloads.prompts import domain_prompts

from .corpus import DOMAINS

PROMPTS = 40
TOKENS = 96


def write_card(engine_dir: Path, work_dir: Path) -> None:
    """README.md of the engine folder, and card.json with the same figures."""
    torch.set_num_threads(1)
    losses = json.loads((work_dir / "target.json").read_text())
    spec = load_engine_spec(engine_dir)
    champion = engine_dir / spec.champion
    build_dir = work_dir / "card-build"
    build_dir.mkdir(parents=True, exist_ok=True)
    if not (build_dir / "draft").exists():
        (build_dir / "draft").symlink_to(champion)
    digest = digest_draft(champion)
    build = EngineBuild(digest[:16], spec.name, spec.backend, str(build_dir), "shipped", digest,
                        engine_digest(engine_dir / spec.model, spec), 0.0)
    rows: dict[str, dict[str, Any]] = {}
    for domain in DOMAINS:
        prompts = [p.text for p in domain_prompts(engine_dir, domain)[-PROMPTS:]]
        bench = benchmark_builds(engine_dir / spec.model, spec, {"draft": build}, prompts,
                                 GateSettings(bench_tokens=TOKENS, equivalence_prompts=PROMPTS), SpeculationSettings(), mode="3")
        loops = [is_looping(run.tokens) for run in bench.runs[PLAIN]]
        steady = [run for run, looping in zip(bench.runs["draft"], loops, strict=True) if not looping]
        equal = bench.equivalence["draft"]
        rows[domain] = {"loss": losses["held_out_loss"][domain], "looping": round(sum(loops) / len(loops), 2),
                        "acceptance_length": round(acceptance_length(bench.runs["draft"]), 2),
                        "acceptance_length_non_looping": round(acceptance_length(steady), 2) if steady else None,
                        "compared": equal.compared, "ties": equal.ties, "mismatches": equal.mismatches}
        print(domain, rows[domain], flush=True)
    (engine_dir / "card.json").write_text(json.dumps({"target": losses, "domains": rows}, indent=1) + "\n")
    template = (Path(__file__).parent / "card.md").read_text()
    table = "\n".join(f"| {d} | {r['loss']:.2f} | {r['looping']:.0%} | {r['acceptance_length']:.2f} | "
                      f"{r['acceptance_length_non_looping']} | {r['compared']} / {r['ties']} / {r['mismatches']} |"
                      for d, r in rows.items())
    (engine_dir / "README.md").write_text(template.replace("{{table}}", table).replace("{{tokens}}", f"{losses['tokens'] / 1e6:.1f}"))
