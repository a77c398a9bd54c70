"""Shared fixtures. One thread: two thread pools on two cores are up to ten times slower (facts on the embedded engine)."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")          # before torch starts its threads
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import hypothesis
import pytest
import torch

from tests.helpers import tiny_spec, write_tiny_build, write_tiny_target
from tide_pipeline.config import project_root
from tide_pipeline.contracts import EngineBuild
from tide_pipeline.models.target import Target

torch.set_num_threads(1)

hypothesis.settings.register_profile("steady", derandomize=True, deadline=None, database=None,
                                     suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.register_profile("explore", parent=hypothesis.settings.get_profile("steady"), derandomize=False, max_examples=400)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target's Hugging Face folder: 4 layers, every byte in its vocabulary. Read only."""
    return write_tiny_target(tmp_path_factory.mktemp("tiny") / "target")


@pytest.fixture(scope="session")
def tiny_target(tiny_dir: Path) -> Target:
    """The same, loaded, with the spec that `tiny_engine` uses."""
    return Target(tiny_dir, tiny_spec())


@pytest.fixture(scope="session")
def tiny_build(tmp_path_factory: pytest.TempPathFactory, tiny_target: Target) -> EngineBuild:
    """A draft that often agrees with the tiny target. Read only."""
    return write_tiny_build(tmp_path_factory.mktemp("build"), tiny_target)


@pytest.fixture(scope="session")
def pocket_dir() -> Path:
    """engines/pocket with its trained target; skips where it has not been made."""
    folder = project_root() / "engines" / "pocket"
    if not (folder / "target" / "model.safetensors").is_file():
        pytest.skip(f"{folder}/target/model.safetensors is not there: make it with engines/pocket/make.py")
    return folder
