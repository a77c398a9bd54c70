"""The engine as the benchmark scripts use it: opened on an engine folder, stepped on the calling thread. Times nothing.

Stepping on the calling thread keeps a block's thread CPU time whole, and leaves no hand-over between threads in it.
"""

from __future__ import annotations

import itertools
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from tide_pipeline.config import ServeSettings, TideConfig
from tide_pipeline.contracts import EngineBuild, FinishReason, GenerationRequest, SamplingParams, TokenChunk
from tide_pipeline.engine.embedded import EmbeddedEngine
from tide_pipeline.engine.protocol import Sink
from tide_pipeline.engine_spec import EngineSpec, load_engine_spec
from tide_pipeline.models.checkpoint import DraftIdentity, digest_draft, load_draft, read_identity, save_draft
from tide_pipeline.models.target import Target, read_shape
from tide_pipeline.recipes import load
from tide_pipeline.workloads.prompts import domain_prompts

_numbers = itertools.count()


@dataclass(frozen=True)
class Drafts:
    """Builds in a temporary folder."""

    champion: EngineBuild            # the draft that ships with the engine
    useless: EngineBuild             # the same sizes, random weights


@contextmanager
def drafts_of(engine_dir: Path) -> Iterator[Drafts]:
    """The shipped draft, and one that knows nothing."""
    spec = load_engine_spec(engine_dir)
    with tempfile.TemporaryDirectory(prefix="tide-bench-") as folder:
        champion, useless = Path(folder, "champion"), Path(folder, "useless")
        champion.mkdir()
        (champion / "draft").symlink_to((engine_dir / spec.champion).resolve())
        identity = read_identity(champion / "draft")
        _write_useless(champion / "draft", useless / "draft", engine_dir / spec.model, identity)
        yield Drafts(_build(champion, "champion", spec, identity), _build(useless, "useless", spec, identity))


def _write_useless(like: Path, folder: Path, model_dir: Path, identity: DraftIdentity) -> None:
    draft = load_draft(like, read_shape(model_dir))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in draft.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5 if p.dim() == 2 else torch.ones(p.shape))
    folder.mkdir(parents=True)
    save_draft(draft, folder, identity, {"recipe": "random weights, for benchmarks"})


def _build(folder: Path, version: str, spec: EngineSpec, identity: DraftIdentity) -> EngineBuild:
    digest = digest_draft(folder / "draft")
    return EngineBuild(digest[:16], spec.name, spec.backend, str(folder), version, digest, identity.engine_digest, time.time())


@contextmanager
def engine_of(engine_dir: Path, drafts: Mapping[str, EngineBuild], max_batch: int, sink: Sink | None = None, *,
              profile: bool = True, target: Target | None = None) -> Iterator[EmbeddedEngine]:
    """An engine that is not started: `serve` steps it. Without a profile it is good for fixed lengths only. Engines that are compared
    share a `target`: where its weights lie in memory makes a step some percent faster or slower."""
    spec, config = load_engine_spec(engine_dir), settings()
    engine = EmbeddedEngine(engine_dir / spec.model, spec, ServeSettings(max_batch=max_batch, queue_size=1_000), config.speculation, sink,
                            target)
    try:
        engine.set_drafts(drafts)
        if profile:
            engine.profile()
        yield engine
    finally:
        engine.close()


def settings() -> TideConfig:
    """Of the recipe that serves the pocket target."""
    return load("pocket_cpu")


def prompts_of(engine_dir: Path, domain: str, longest: int | None = None) -> list[str]:
    """The shipped prompts of a domain, cut to `longest` characters."""
    return [prompt.text[:longest] for prompt in domain_prompts(engine_dir, domain)]


def pick(prompts: Sequence[str], count: int, round_: int) -> list[str]:
    """`count` prompts for a round: the next ones in turn, the same for every side of a comparison."""
    return [prompts[(round_ * count + i) % len(prompts)] for i in range(count)]


def ask(prompt: str, tokens: int, speculation: str, workload: str = "default", temperature: float = 0.0) -> GenerationRequest:
    """To exactly `tokens` tokens; a sampled answer is the same for the same prompt."""
    how = SamplingParams(max_tokens=tokens, temperature=temperature, seed=zlib.crc32(prompt.encode()), ignore_eos=True)
    return GenerationRequest(f"bench-{next(_numbers)}", prompt, how, speculation, workload)


def serve(engine: EmbeddedEngine, requests: Sequence[GenerationRequest]) -> list[list[int]]:
    """Submit all, step until all have ended; the tokens of each."""
    answers: dict[str, list[int]] = {request.request_id: [] for request in requests}
    running, failed = set(answers), []

    def hear(chunk: TokenChunk) -> None:
        answers[chunk.request_id] += chunk.token_ids
        if chunk.finish_reason is not None:
            running.discard(chunk.request_id)
            if chunk.finish_reason is not FinishReason.LENGTH:
                failed.append(f"{chunk.finish_reason} {chunk.error}")

    for request in requests:
        engine.submit(request, hear)
    while running:
        engine.step()
    if failed:
        raise RuntimeError(f"a benchmark request ended with {failed[0]}: look at the engine's log")
    return list(answers.values())


class Population:
    """Requests that run together: they join, are stepped a number of tokens further, and are cancelled before any of them ends.

    So a block sees one batch size only, where whole requests would see every size from 1 up as they join and down as they end.
    """

    def __init__(self, engine: EmbeddedEngine, requests: Sequence[GenerationRequest]) -> None:
        self.engine, self.tokens, self.ended = engine, 0, 0
        self._joined: set[str] = set()
        self._streams = [engine.submit(request, self._hear) for request in requests]
        while len(self._joined) < len(requests):
            engine.step()
        self.tokens = 0                                           # counted from here, all requests together

    def _hear(self, chunk: TokenChunk) -> None:
        self.tokens += len(chunk.token_ids)
        self._joined.add(chunk.request_id)
        self.ended += chunk.finish_reason is not None

    def advance_to(self, tokens: int) -> int:
        """Step until all together have written this many since they joined; returns how many were written now."""
        before = self.tokens
        while self.tokens < tokens and not self.ended:
            self.engine.step()
        if self.ended:
            raise RuntimeError("a request ended inside a block: ask for fewer tokens a block, or look at the engine's log")
        return self.tokens - before

    def leave(self) -> None:
        for stream in self._streams:
            stream.cancel()
        while self.ended < len(self._streams):
            self.engine.step()


def count(answers: Sequence[Sequence[int]]) -> int:
    return sum(len(tokens) for tokens in answers)
