"""A tiny engine folder and settings for tests of the Triton face, real in every part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ask, tiny_spec, write_tiny_build, write_tiny_target
from tide_pipeline.config import EngineSpec, TideConfig, load_engine_spec, override
from tide_pipeline.contracts import Deployment, EngineBuild
from tide_pipeline.deployment.builds import save_build
from tide_pipeline.deployment.record import DeploymentRecord
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
    spec = tiny_spec(max_context=CONTEXT)
    engine.joinpath("engine.toml").write_text(
        f'name = "tiny"\nbackend = "embedded"\nmodel = "target"\nrevision = "1"\ncapture_layers = {list(spec.capture_layers)}\n'
        f'soft_targets = true\nchampion = ""\nmax_context = {CONTEXT}\nmax_draft_length = {spec.max_draft_length}\n')
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
