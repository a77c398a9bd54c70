"""Builds for TensorRT-LLM: whole or absent, certified file by file, made and read without loading a weight."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from tests.gpu_engines import small_config, small_spec, write_gpu_draft, write_gpu_engine
from tide_pipeline.build.engine import build_engine
from tide_pipeline.cli import app
from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import EngineBuild
from tide_pipeline.deployment.builds import list_builds, load_build
from tide_pipeline.engine_spec import load_engine_spec
from tide_pipeline.errors import BuildError, EngineMismatch, SettingsError
from tide_pipeline.models.checkpoint import save_draft
from tide_pipeline.models.draft_files import check_draft
from tide_pipeline.models.target import engine_digest
from tide_pipeline.training.target_head import target_head_of
from tide_pipeline.training.vocabulary import new_draft


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIDE_CONFIG", raising=False)


@pytest.fixture
def config(tmp_path: Path) -> TideConfig:
    return small_config(write_gpu_engine(tmp_path / "engines"), tmp_path / "state", trtllm="1.3")


@pytest.fixture
def draft(tmp_path: Path, config: TideConfig) -> Path:
    return write_gpu_draft(tmp_path / "draft", load_engine_spec(config.engine_dir))


@pytest.fixture
def build(config: TideConfig, draft: Path) -> EngineBuild:
    return build_engine(config, draft, "v1-abc")


def again(config: TideConfig, build: EngineBuild) -> EngineBuild:
    return load_build(config.state.builds, "small", build.build_id)


def test_a_build_holds_all_that_triton_needs(config: TideConfig, build: EngineBuild) -> None:
    folder = Path(build.path)
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
        "build.json", "draft/config.json", "draft/model.safetensors", "model_repository/small/1/model.py",
        "model_repository/small/1/model.yaml", "model_repository/small/config.pbtxt", "provenance.json", "settings.toml"]
    arguments = yaml.safe_load((folder / "model_repository/small/1/model.yaml").read_text())
    assert arguments["speculative_config"]["speculative_model"] == str(folder / "draft")
    assert (arguments["model"], arguments["max_batch_size"]) == (str(config.engine_dir / "target"), 8)
    assert str(folder / "settings.toml") in (folder / "model_repository/small/config.pbtxt").read_text()
    assert build.backend == "trtllm" and build.warmup == {} and again(config, build) == build


def test_its_certificate_names_target_draft_version_and_every_file(config: TideConfig, build: EngineBuild) -> None:
    born, spec = json.loads((Path(build.path) / "provenance.json").read_text()), load_engine_spec(config.engine_dir)
    assert born["target"] == {"repo": "owner/small", "revision": spec.revision, "engine_digest": spec.reference_digest}
    assert born["draft"] == {"version": "v1-abc", "digest": build.draft_digest} and born["trtllm"] == "1.3"
    assert born["files"].keys() == {"draft/config.json", "draft/model.safetensors", "settings.toml", "model_repository/small/1/model.py",
                                    "model_repository/small/1/model.yaml", "model_repository/small/config.pbtxt"}
    assert born["git_sha"] and born["packages"]


def test_building_again_gives_the_same_build_and_another_version_another(config: TideConfig, draft: Path, build: EngineBuild,
                                                                        tmp_path: Path) -> None:
    assert build_engine(config, draft, "v9-abc") == build
    other = build_engine(small_config(config.engine_dir, tmp_path / "state", trtllm="1.2"), draft, "v1-abc")
    wider = build_engine(small_config(config.engine_dir, tmp_path / "state", trtllm="1.3", max_batch=4), draft, "v1-abc")
    assert len({build.build_id, other.build_id, wider.build_id}) == 3
    assert {b.engine_digest for b in (build, other, wider)} == {build.engine_digest}, "the states they capture are the same"
    assert len(list_builds(config.state.builds, "small")) == 3


@pytest.mark.parametrize("name", ["model_repository/small/1/model.yaml", "model_repository/small/config.pbtxt", "settings.toml",
                                  "draft/model.safetensors"])
def test_an_altered_file_is_noticed_and_made_again(name: str, config: TideConfig, draft: Path, build: EngineBuild) -> None:
    file = Path(build.path) / name
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(BuildError, match=r"altered.*tide build"):
        again(config, build)
    assert build_engine(config, draft, "v1-abc").build_id == build.build_id and again(config, build).draft_digest == build.draft_digest


@pytest.mark.parametrize("text", [None, "{", "[]", "{}"])
def test_a_build_without_its_certificate_is_none(text: str | None, config: TideConfig, build: EngineBuild) -> None:
    file = Path(build.path) / "provenance.json"
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    with pytest.raises(BuildError, match=r"provenance\.json is missing or was altered"):
        again(config, build)


def test_a_missing_file_is_named(config: TideConfig, build: EngineBuild) -> None:
    (Path(build.path) / "model_repository/small/1/model.yaml").unlink()
    with pytest.raises(BuildError, match=r"model\.yaml is missing"):
        again(config, build)


def test_reading_and_verifying_needs_no_torch(config: TideConfig, build: EngineBuild) -> None:
    code = ("import sys; sys.modules['torch'] = None; from pathlib import Path; from tide_pipeline.deployment.builds import load_build; "
            "print(load_build(Path(sys.argv[1]), 'small', sys.argv[2]).draft_digest)")
    line = [sys.executable, "-c", code, str(config.state.builds), build.build_id]
    done = subprocess.run(line, capture_output=True, text=True, check=True,
                          timeout=500, cwd=Path(__file__).resolve().parents[2])
    assert done.stdout.strip() == build.draft_digest


def test_what_does_not_fit_is_refused_before_anything_is_written(config: TideConfig, draft: Path, tmp_path: Path) -> None:
    spec = load_engine_spec(config.engine_dir)
    short = write_gpu_draft(tmp_path / "short", spec, {"max_position_embeddings": 2048})
    with pytest.raises(EngineMismatch, match="default left in by mistake"):
        build_engine(config, short, "v1-abc")
    with pytest.raises(SettingsError, match=r"no facts about TensorRT-LLM 0\.9: known lines are 1\.2, 1\.3, 1\.4"):
        build_engine(small_config(config.engine_dir, tmp_path / "state", trtllm="0.9"), draft, "v1-abc")
    assert [p.name for p in (config.state.builds / "small").glob("*") if p.name != ".lock"] == []


def test_a_target_by_revision_needs_no_bytes_for_its_digest(tmp_path: Path) -> None:
    spec = small_spec(tmp_path / "engines")
    assert engine_digest(tmp_path / "nowhere", spec) == spec.reference_digest
    assert spec.reference_digest != small_spec_with(tmp_path, revision="a" * 40).reference_digest
    assert spec.reference_digest != small_spec_with(tmp_path, capture_layers=[0, 5, 8]).reference_digest


def test_a_draft_made_from_scratch_for_it_is_one_that_its_build_takes(config: TideConfig, tmp_path: Path) -> None:
    """The trainer needs two matrices of the target and the numbers in engine.toml, not a network that we could run."""
    spec, folder = load_engine_spec(config.engine_dir), config.engine_dir / "target"
    folder.mkdir()
    save_file({name: torch.randn(300, 64, dtype=torch.bfloat16) for name in ("model.embed_tokens.weight", "lm_head.weight")}
              | {"model.layers.0.mlp.experts.gate_up_proj_blocks": torch.zeros(2, 2, dtype=torch.uint8)}, folder / "model.safetensors")
    head = target_head_of(config)
    assert head.digest == spec.reference_digest and head.embedding_VD.shape == (300, 64)
    save_draft(new_draft(head, torch.arange(0, 300, 3)), tmp_path / "new", head.identity, {"recipe": "test"})
    build = build_engine(config, tmp_path / "new", "v1-new")
    assert again(config, build).engine_digest == spec.reference_digest
    assert check_draft(Path(build.path) / "draft", spec)["max_position_embeddings"] == 8192


def small_spec_with(folder: Path, **changes: Any) -> Any:
    return load_engine_spec(write_gpu_engine(folder / "other", changes))


# --- the command -------------------------------------------------------------------------------------------------

def tide_build(config: TideConfig, *words: str) -> Result:
    return CliRunner().invoke(app, ["build", "--engine", "small", "--state", str(config.state.root),
                                    "--set", f"engines_dir={config.engines_dir}", *words])


def test_tide_build_says_what_to_start_in_which_container(config: TideConfig, draft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDE_PROJECT_ROOT", str(Path(config.engines_dir).parent))
    done = tide_build(config, "--backend", "trtllm", "--trtllm", "1.4", "--draft", str(draft))
    assert done.exit_code == 0, done.stderr
    assert "for TensorRT-LLM 1.4 on 1 x h100" in done.stdout and "launch_triton_server.py --model_repo=" in done.stdout
    made = list_builds(config.state.builds, "small")[0]
    assert made.draft_version.startswith("local-") and "1.4" in (Path(made.path) / "settings.toml").read_text()


def test_tide_build_takes_the_starting_draft_or_says_how_to_get_it(config: TideConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDE_PROJECT_ROOT", str(Path(config.engines_dir).parent))
    missing = tide_build(config, "--backend", "trtllm")
    assert missing.exit_code == 2 and "hf download owner/small-eagle3 --revision" in missing.stderr
    write_gpu_draft(config.engine_dir / "draft", load_engine_spec(config.engine_dir))
    made = json.loads(tide_build(config, "--json").stdout)
    assert made["backend"] == "trtllm" and made["draft_version"].startswith("shipped-")


def test_a_backend_that_the_engine_is_not_for(config: TideConfig, draft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDE_PROJECT_ROOT", str(Path(config.engines_dir).parent))
    done = tide_build(config, "--backend", "embedded", "--draft", str(draft))
    assert done.exit_code == 2 and "engine small is for backend 'trtllm', not 'embedded'" in done.stderr
