"""By hand, the heart of the loop: serve a shifted domain, capture, retrain the draft, and measure on held-out requests.

    python benchmarks/recovery.py --domain de --old py --seconds 75 --json benchmarks/results/recovery.json

For the new and the old domain: acceptance length and speed against no speculation at draft length 3 and with the
controller, before (stale) and after (adapted), greedy and at temperature 0.8, split by looping text.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import facts, median_interval

from tide_pipeline.capture.recorder import Recorder
from tide_pipeline.config import CaptureSettings, ServeSettings, TideConfig, load_engine_spec, override
from tide_pipeline.contracts import EngineBuild, GenerationRequest, SamplingParams
from tide_pipeline.engine.embedded import EmbeddedEngine
from tide_pipeline.gate.bench import PLAIN, Bench, acceptance_length, benchmark_builds
from tide_pipeline.models.checkpoint import digest_draft
from tide_pipeline.recipes import load
from tide_pipeline.training.loop import train_draft
from tide_pipeline.workloads.loops import is_looping
from tide_pipeline.workloads.prompts import Prompt, domain_prompts, load_prompts


def draft_build(engine_digest: str, folder: Path, version: str) -> EngineBuild:
    digest = digest_draft(folder / "draft")
    return EngineBuild(digest[:16], "pocket", "embedded", str(folder), version, digest, engine_digest, time.time())


def capture(config: TideConfig, build: EngineBuild, prompts: list[Prompt], name: str) -> dict[str, float]:
    """Serve all prompts, 8 at a time, with the stale draft and capture on."""
    spec = load_engine_spec(config.engine_dir)
    recorder = Recorder(CaptureSettings(mode="on"), spec.name, config.state.lake, "bench")
    engine = EmbeddedEngine(config.engine_dir / spec.model, spec, ServeSettings(queue_size=10_000), config.speculation, recorder)
    engine.set_drafts({"*": build})
    engine.profile()
    engine.start()
    began = time.time()
    sampling = [SamplingParams(96, 0.8 if i % 5 == 4 else 0.0, seed=i) for i in range(len(prompts))]
    streams = [engine.submit(GenerationRequest(f"{name}-{i}", p.text, how, workload=name))
               for i, (p, how) in enumerate(zip(prompts, sampling, strict=True))]
    tokens = sum(len(chunk.token_ids) for stream in streams for chunk in stream)
    seconds = time.time() - began
    engine.close()
    return {"seconds": round(seconds, 1), "output_tokens": tokens, "tokens_per_s": round(tokens / seconds, 1),
            "captured_rows": int(recorder.stats()["captured_tokens"])}


def measure(config: TideConfig, builds: dict[str, EngineBuild], prompts: list[Prompt], temperature: float, mode: str) -> dict[str, Any]:
    spec = load_engine_spec(config.engine_dir)
    bench = benchmark_builds(config.engine_dir / spec.model, spec, builds, [p.text for p in prompts], config.gate, config.speculation,
                             temperature=temperature, mode=mode)
    return {tag: row(bench, tag) for tag in builds}


def row(bench: Bench, tag: str) -> dict[str, Any]:
    plain, runs = bench.runs[PLAIN], bench.runs[tag]
    loops = [is_looping(run.tokens) for run in plain]
    out: dict[str, Any] = {"looping_share": round(sum(loops) / len(loops), 3)}
    for name, wanted in (("non_looping", False), ("looping", True)):
        chosen = [i for i, looping in enumerate(loops) if looping == wanted]
        if chosen:
            ratios = [plain[i].seconds / len(plain[i].tokens) / (runs[i].seconds / len(runs[i].tokens)) for i in chosen]
            out[name] = {"acceptance_length": round(acceptance_length([runs[i] for i in chosen]), 3), "speedup": median_interval(ratios)}
    equal = bench.equivalence[tag]
    return out | {"compared": equal.compared, "ties": equal.ties, "mismatches": equal.mismatches}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines-dir", default="engines")
    parser.add_argument("--domain", default="de", help="the shifted domain")
    parser.add_argument("--old", default="py", help="a domain the champion knows")
    parser.add_argument("--prompts", type=Path, help="prompt file of the shifted domain instead of the shipped ones")
    parser.add_argument("--old-prompts", type=Path)
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--heldout", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=75.0, help="training budget")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--set", default="{}", help="settings as JSON")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    state = Path(tempfile.mkdtemp(prefix="tide-recovery-"))
    config = override(load(values={"state_dir": str(state), "engines_dir": args.engines_dir}), {
        "training": {"time_budget_s": args.seconds, "nice": 0},
        "gate": {"bench_tokens": args.tokens, "equivalence_prompts": args.heldout}})
    config = override(config, json.loads(args.set))
    new = load_prompts(args.prompts) if args.prompts else domain_prompts(config.engine_dir, args.domain)
    old = load_prompts(args.old_prompts) if args.old_prompts else domain_prompts(config.engine_dir, args.old)
    spec = load_engine_spec(config.engine_dir)
    probe = EmbeddedEngine(config.engine_dir / spec.model, spec, ServeSettings(max_batch=1), config.speculation)
    (state / "stale").mkdir()
    (state / "stale" / "draft").symlink_to((config.engine_dir / spec.champion).resolve())
    stale = draft_build(probe.digest, state / "stale", "stale")
    result: dict[str, Any] = {"machine": facts(), "domain": args.domain, "old": args.old, "train_seconds": args.seconds}
    result["capture_old"] = capture(config, stale, old[: args.requests // 3], args.old)
    result["capture_new"] = capture(config, stale, new[: args.requests], args.domain)
    print(json.dumps(result, indent=1), flush=True)
    checkpoint = train_draft(config, workload=args.domain, out_dir=state / "adapted" / "draft", champion=state / "stale" / "draft",
                             progress=lambda p: print(p.text, end="\r", flush=True))
    result["offline_acceptance_length"] = checkpoint.acceptance_length
    result["training_steps"] = checkpoint.steps
    builds = {"stale": stale, "adapted": draft_build(probe.digest, state / "adapted", "adapted")}
    for domain, prompts in ((args.domain, new[-args.heldout :]), (args.old, old[-args.heldout :])):
        result[domain] = {"greedy_fixed_3": measure(config, builds, prompts, 0.0, "3"),
                          "greedy_auto": measure(config, builds, prompts, 0.0, "auto"),
                          "sampled_0.8_fixed_3": measure(config, builds, prompts, 0.8, "3")}
        print(json.dumps(result[domain], indent=1), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
