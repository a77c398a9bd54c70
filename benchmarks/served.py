"""Serve prompts with one draft, count what each request accepted, and keep what it leaves in a lake. Knows no training.

A workload's traffic is served once; lakes of several workloads are put together by hard links.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tide_pipeline.capture.recorder import Recorder
from tide_pipeline.config import CaptureSettings, ServeSettings, TideConfig
from tide_pipeline.contracts import EngineBuild, GenerationRequest, SamplingParams
from tide_pipeline.engine.embedded import EmbeddedEngine
from tide_pipeline.engine_spec import load_engine_spec
from tide_pipeline.models.checkpoint import digest_draft
from tide_pipeline.models.target import engine_digest
from tide_pipeline.workloads.prompts import Prompt, domain_prompts


@dataclass(frozen=True)
class Served:
    """What one request did, by the engine's own count."""

    request_id: str
    tokens: tuple[int, ...]
    verify_steps: int
    accepted: int


def build_of(config: TideConfig, draft: Path, version: str, folder: Path) -> EngineBuild:
    """A build directory around a draft folder."""
    spec = load_engine_spec(config.engine_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "draft").is_symlink():
        (folder / "draft").symlink_to(draft.resolve())
    digest = digest_draft(draft)
    return EngineBuild(digest[:16], spec.name, "embedded", str(folder), version, digest,
                       engine_digest(config.engine_dir / spec.model, spec), time.time())


def split_prompts(config: TideConfig, domain: str, unseen: int, most: int) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to collect from, `most` at most, and the last `unseen` ones, which nothing is ever trained on."""
    prompts = domain_prompts(config.engine_dir, domain)
    return prompts[:-unseen][:most], prompts[-unseen:]


def serve(config: TideConfig, build: EngineBuild, prompts: Sequence[Prompt], workload: str, *, temperatures: Sequence[float],
          tokens: int, speculation: str, lake: Path | None = None, seed: int = 0) -> list[Served]:
    """All prompts, 8 at a time, request i with seed + i at temperature i modulo their number; into `lake`, if there is one."""
    spec = load_engine_spec(config.engine_dir)
    recorder = Recorder(CaptureSettings(mode="on"), spec.name, lake, "bench") if lake else None
    engine = EmbeddedEngine(config.engine_dir / spec.model, spec, ServeSettings(queue_size=len(prompts)), config.speculation, recorder)
    engine.set_drafts({"*": build})
    if speculation == "auto":
        engine.profile()
    engine.start()
    try:
        streams = [engine.submit(GenerationRequest(
            f"{workload}-{i}", p.text, SamplingParams(tokens, temperatures[i % len(temperatures)], seed=seed + i), speculation, workload,
            deadline_s=3600.0)) for i, p in enumerate(prompts)]
        found = []
        for stream in streams:
            chunks = list(stream)
            found.append(Served(stream.request_id, tuple(t for c in chunks for t in c.token_ids), chunks[-1].verify_steps,
                                chunks[-1].accepted_tokens))
    finally:
        engine.close()
    return found


def link_lakes(parts: Iterable[Path], into: Path) -> Path:
    """One lake that holds the signals of all of them."""
    for part in parts:
        for shard in sorted((part / "signals").rglob("*.parquet")):
            link = into / shard.relative_to(part)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                os.link(shard, link)
    return into
