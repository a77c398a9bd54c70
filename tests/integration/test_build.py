"""Builds from tiny drafts: complete or absent, verified, made once."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from tests.fakes_rollout import write_engine
from tests.helpers import tiny_spec, write_tiny_build, write_tiny_target
from tide_pipeline.build import engine as engine_module
from tide_pipeline.build.engine import build_engine
from tide_pipeline.config import TideConfig, override
from tide_pipeline.contracts import EngineBuild
from tide_pipeline.deployment.builds import list_builds, load_build
from tide_pipeline.errors import BuildError, CheckpointError, EngineMismatch
from tide_pipeline.models.target import Target


@pytest.fixture
def config(tmp_path: Path, tiny_dir: Path) -> TideConfig:
    return write_engine(tmp_path, tiny_dir)


@pytest.fixture
def draft(tmp_path: Path, tiny_build: EngineBuild) -> Path:
    return shutil.copytree(Path(tiny_build.path) / "draft", tmp_path / "draft")


def left(config: TideConfig) -> list[str]:
    return sorted(p.name for p in (config.state.builds / "tiny").iterdir() if p.name != ".lock")


def test_a_build_is_whole_and_was_run_once(config: TideConfig, draft: Path) -> None:
    build = build_engine(config, draft, "v1-abc")
    assert load_build(config.state.builds, "tiny", build.build_id) == build and left(config) == [build.build_id]
    assert build.warmup["tokens_per_s"] > 0 and build.warmup["acceptance_length"] > 1 and build.warmup["load_s"] > 0
    folder = Path(build.path)
    assert {p.name for p in folder.iterdir()} == {"build.json", "draft", "model_repository", "settings.toml"}
    assert (folder / "draft" / "provenance.json").is_file()
    rendered = folder / "model_repository" / "tiny"
    assert (rendered / "1" / "model.py").is_file() and str(folder / "settings.toml") in (rendered / "config.pbtxt").read_text()
    assert len(build.build_id) == 16 and build.draft_version == "v1-abc"


def test_building_again_gives_the_same_build(config: TideConfig, draft: Path) -> None:
    first = build_engine(config, draft, "v1-abc", warm_up=False)
    assert build_engine(config, draft, "v9-abc") == first


def test_an_altered_build_is_made_again(config: TideConfig, draft: Path) -> None:
    build = build_engine(config, draft, "v1-abc", warm_up=False)
    weights = Path(build.path) / "draft" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    again = build_engine(config, draft, "v1-abc", warm_up=False)
    assert load_build(config.state.builds, "tiny", build.build_id) == again and left(config) == [build.build_id]


@pytest.mark.parametrize("step", ["recipes.freeze", "render_model_repository", "warm_up_draft", "_put_in_place", "save_build"])
def test_a_crash_leaves_no_half_build(config: TideConfig, draft: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """A full disk at each step, then a kill (no clean-up at all) at the same step."""
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    class Killed(BaseException): ...

    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(f"tide_pipeline.build.engine.{step}", full)
        with pytest.raises(BuildError, match=r"No space left on device.*free some space"):
            build_engine(config, draft, "v1-abc")
        assert list_builds(config.state.builds, "tiny") == []
        patch.setattr(f"tide_pipeline.build.engine.{step}", killed)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            build_engine(config, draft, "v1-abc")
        assert list_builds(config.state.builds, "tiny") == []
    build = build_engine(config, draft, "v1-abc", warm_up=False)
    assert left(config) == [build.build_id], "what the killed one left is swept away"


def test_a_draft_that_changes_under_the_copy_is_refused(config: TideConfig, draft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_bytes(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes() + b" ")

    monkeypatch.setattr(engine_module.shutil, "copyfile", other_bytes)
    with pytest.raises(BuildError, match="changed while it was copied"):
        build_engine(config, draft, "v1-abc", warm_up=False)
    assert left(config) == []


def test_foreign_and_damaged_drafts_are_refused_before_anything_is_written(config: TideConfig, draft: Path, tmp_path: Path) -> None:
    other = Target(write_tiny_target(tmp_path / "other", seed=9), tiny_spec())
    foreign = Path(write_tiny_build(tmp_path / "foreign", other).path) / "draft"
    with pytest.raises(EngineMismatch, match="tide train"):
        build_engine(config, foreign, "v1-abc")
    (draft / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(CheckpointError):
        build_engine(config, draft, "v1-abc")
    (draft / "config.json").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        build_engine(config, draft, "v1-abc")
    assert left(config) == []


def test_each_engine_has_builds_of_its_own(config: TideConfig, draft: Path, tmp_path: Path) -> None:
    build_engine(config, draft, "v1-abc", warm_up=False)
    assert list_builds(config.state.builds, "bare") == []
    with pytest.raises(BuildError, match="no build id"):
        load_build(override(config, {"engine": "bare"}).state.builds, "bare", "../tiny")
