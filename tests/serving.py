"""A tiny engine folder and settings for tests of the Triton face, real in every part."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import ask, generate, tiny_spec, write_engine_toml, write_tiny_build, write_tiny_target
from tide_pipeline.config import TideConfig, override
from tide_pipeline.contracts import Deployment, EngineBuild, GenerationRequest
from tide_pipeline.deployment.builds import save_build
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.engine.embedded import EmbeddedEngine
from tide_pipeline.engine.text import TextCodec, TextStream
from tide_pipeline.engine_spec import EngineSpec, load_engine_spec
from tide_pipeline.models.checkpoint import digest_draft
from tide_pipeline.models.target import Target
from tide_pipeline.recipes import freeze
from tide_pipeline.serve.client import TritonClient

CONTEXT = 512


@dataclass(frozen=True)
class Place:
    """Settings of one tiny engine, its frozen file and its loaded target."""

    config: TideConfig
    config_file: Path
    target: Target

    @property
    def spec(self) -> EngineSpec:
        return load_engine_spec(self.config.engine_dir)

    @property
    def record(self) -> DeploymentRecord:
        return DeploymentRecord(self.config.state.deployments, self.config.target)

    def build(self, version: str, *, noise: float = 0.1, seed: int = 0) -> EngineBuild:
        """A build where replicas look for it."""
        draft = write_tiny_build(self.config.state.builds / "new", self.target, version=version, noise=noise, seed=seed)
        folder = self.config.state.builds / self.config.target / draft.build_id
        folder.parent.mkdir(parents=True, exist_ok=True)
        Path(draft.path).rename(folder)
        build = replace(draft, path=str(folder))
        save_build(build)
        return build

    def deploy(self, drafts: Mapping[str, str], **fields: Any) -> Deployment:
        """Append the next record: workload tag -> build id."""
        latest = self.record.latest()
        known: dict[str, Any] = {"groups": {"rest": dict(drafts)}, "canary_replicas": (), "stage": "stable"}
        n = (latest.n if latest else 0) + 1
        return self.record.append(Deployment(n, self.config.target, who="test", reason="a test", **known | fields))


def write_place(folder: Path, values: Mapping[str, Any] | None = None) -> Place:
    """`folder/engines/tiny`, `folder/state` and `folder/tide.toml`."""
    engine = folder / "engines" / "tiny"
    write_tiny_target(engine / "target", max_positions=CONTEXT)
    write_engine_toml(engine, tiny_spec(max_context=CONTEXT))
    config = override(TideConfig(engine="tiny", engines_dir=str(folder / "engines"), state_dir=str(folder / "state")), values or {})
    freeze(config, folder / "tide.toml")
    return Place(config, folder / "tide.toml", Target(engine / "target", load_engine_spec(engine)))


def cancel_while_it_streams(client: TritonClient) -> None:
    """Cancel the request "slow" by its id after its first piece; its stream says so."""
    with client.stream(ask("slow", "hello world", max_tokens=480, ignore_eos=True)) as pieces:
        told = iter(pieces)
        next(told)
        client.cancel("slow")
        with pytest.raises(Exception, match="cancelled"):
            list(told)


def plain_text(place: Place, request: GenerationRequest) -> str:
    """The same request in process, without Triton and without speculation; of the stand-in for TensorRT-LLM, what it is known to say."""
    if place.spec.backend == "trtllm":
        return known_text(place, request)
    engine = EmbeddedEngine(place.config.engine_dir / "target", place.spec, place.config.serve, place.config.speculation)
    return generate(engine, request)[0].text


def known_text(place: Place, request: GenerationRequest) -> str:
    from tests.trtllm import KnownNetwork

    codec, how = TextCodec(place.config.engine_dir / "target"), request.sampling
    tokens = KnownNetwork(place).continuation(codec.encode(request.prompt), how.max_tokens, ends=not how.ignore_eos)
    stream = TextStream(codec, how.stop)
    return stream.push(tokens) + stream.finish()


def poison(build: EngineBuild) -> None:
    """NaN in the draft's weights, digests in order: it looks like a build that was made so."""
    folder = Path(build.path) / "draft"
    weights = load_file(folder / "model.safetensors")
    weights["fc.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors")
    save_build(replace(build, draft_digest=digest_draft(folder)))


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    gives_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < gives_up, "it never came true"
        time.sleep(0.05)


def value(metrics: dict[str, float], name: str, having: str = "") -> float:
    """The sum of a metric's series."""
    return sum(number for series, number in metrics.items() if series.startswith(name + "{") and having in series)
