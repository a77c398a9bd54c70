"""`tide engines`: every shipped engine passes; every fault that we could think of is told with what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.gpu_engines import BASE, ENGINE, RECIPES, small_spec, write_gpu_draft, write_gpu_engine
from tide_pipeline import recipes
from tide_pipeline.build.check import check_engine, list_engines
from tide_pipeline.build.snapshots import starting_draft
from tide_pipeline.cli import app
from tide_pipeline.config import TideConfig
from tide_pipeline.engine_spec import load_engine_spec
from tide_pipeline.errors import CheckpointError, SettingsError

ENGINES = Path(__file__).resolve().parents[2] / "engines"
SHIPPED = ["gpt-oss-120b", "llama-3.1-8b", "llama-3.3-70b", "pocket", "qwen3-8b"]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIDE_CONFIG", raising=False)


def faults(engine_dir: Path) -> dict[str, str]:
    return {finding.check: finding.text for finding in check_engine(engine_dir) if not finding.passed}


def test_the_shipped_engines_are_those_of_the_docs() -> None:
    assert list_engines(ENGINES) == SHIPPED


@pytest.mark.parametrize("engine", SHIPPED)
def test_every_shipped_engine_passes(engine: str) -> None:
    found = check_engine(ENGINES / engine)
    assert [finding for finding in found if not finding.passed] == []
    assert len(found) > 10 or engine == "pocket"


@pytest.mark.parametrize("engine", [name for name in SHIPPED if name != "pocket"])
def test_shipped_engines_capture_the_usual_layers(engine: str) -> None:
    spec = load_engine_spec(ENGINES / engine)
    n = spec.architecture.num_hidden_layers
    assert spec.capture_layers == (1, n // 2 - 1, n - 4) and not spec.soft_targets


def changed(part: str, **values: Any) -> dict[str, Any]:
    return {part: {**ENGINE[part], **values}}


@pytest.mark.parametrize(("changes", "check", "message"), [
    ({"name": "other"}, "engine.toml", "make them the same"),
    ({"backend": "vllm"}, "engine.toml", "there are embedded and trtllm"),
    ({"max_draft_length": 0}, "engine.toml", "max_draft_length = 0"),
    ({"colour": "red"}, "engine.toml", "unknown key 'colour'"),
    ({"max_context": None}, "engine.toml", "max_context"),
    ({"revision": "main"}, "target", "is no commit hash.*git ls-remote https://huggingface.co/owner/small HEAD"),
    ({"repo": "small"}, "target", "expected owner/name"),
    ({"max_context": 10_000}, "target", "beyond the target's 8192 positions"),
    (changed("architecture", head_dim=0, vocab_size=0), "target", r"lacks head_dim, vocab_size.*config\.json"),
    (changed("architecture", num_key_value_heads=3), "target", "one must divide the other"),
    ({"capture_layers": [1, 5, 12]}, "layers", r"ascending layers of the target's 12, from 0: usual are \[1, 5, 8\]"),
    ({"capture_layers": [5, 1, 8]}, "layers", "ascending"),
    ({"capture_layers": [1, 8]}, "layers", "reads three"),
    ({"soft_targets": True}, "layers", "set it to false"),
    (changed("draft", revision="v1"), "draft", "is no commit hash"),
    ({"champion": ""}, "draft", "say where its snapshot lies"),
    ({"trtllm": {"extra": {"max_seq_len": 9}}}, "TensorRT-LLM 1.3", "follows from other settings"),
    ({"trtllm": {"kv_dtype": "fp8"}, "max_context": 4096}, None, "")])
def test_faults_of_engine_toml(changes: Mapping[str, Any], check: str | None, message: str, tmp_path: Path) -> None:
    found = faults(write_gpu_engine(tmp_path / "engines", changes))
    if check is None:
        assert found == {}
    else:
        with pytest.raises(SettingsError, match=message):
            raise SettingsError(found[check])


SERVE, TRAIN = RECIPES["serve"]["h100"]["serve"], RECIPES["train"]["a10"]["training"]


def served(**values: Any) -> dict[str, Any]:
    return {"serve": {"h100": {"serve": {**SERVE, **values}}}}


@pytest.mark.parametrize(("tables", "check", "message"), [
    ({}, "recipes", r"no \[serve\.<gpu>\] table"),
    ({"surf": {}}, "recipes", r"unknown table \[surf\]"),
    (served(gpu="v100"), "serve h100", "no bf16.*It can train"),
    (served(gpu="h1000"), "serve h100", "did you mean 'h100'"),
    (served(gpus=3), "serve h100", "does not divide 4 attention heads"),
    (served(max_batch=9_000_000), "serve h100", "taken before the cache.*Raise serve.gpus, or lower serve.max_batch"),
    (served(max_btach=1), "recipes", "did you mean 'max_batch'"),
    ({**served(), "train": {"v100": {"training": {"gpu": "v100"}}}}, "train v100", r"set training\.autocast = false"),
    ({**served(), "train": {"a10": {"training": {**TRAIN, "window_rows": 90_000}}}}, "train a10", "lower those.*optimizer state alone")])
def test_faults_of_recipes(tables: Mapping[str, Any], check: str, message: str, tmp_path: Path) -> None:
    found = faults(write_gpu_engine(tmp_path / "engines", recipes=tables))
    with pytest.raises(SettingsError, match=message):
        raise SettingsError(found[check])


@pytest.mark.parametrize(("base", "message"), [
    ({}, r"stack\.start_timeout_s = 180: .*set it to 600 or more"),
    ({"stack": {"start_timeout_s": 900.0}, "rollout": {"serve_timeout_s": 900.0}}, r"serve_timeout_s = 900: .*above 900 s"),
    ({"stack": {"start_timeout_s": 900.0}}, r"serve_timeout_s = 120: .*rolled back"),
    ({**BASE, "rollout": {**BASE["rollout"], "max_bake_s": BASE["rollout"]["bake_s"]}}, r"max_bake_s = 1200 .* above rollout\.bake_s")])
def test_times_that_are_over_before_a_server_has_started(base: Mapping[str, Any], message: str, tmp_path: Path) -> None:
    found = faults(write_gpu_engine(tmp_path / "engines", recipes={**RECIPES, "base": base}))
    with pytest.raises(SettingsError, match=message):
        raise SettingsError(found["times h100"])


@pytest.mark.parametrize("engine", [name for name in SHIPPED if name != "pocket"])
def test_shipped_engines_allow_a_server_half_an_hour_to_start(engine: str) -> None:
    """And its cache leaves no room for a second server beside it."""
    for gpu in recipes.gpu_tables(ENGINES / engine)["serve"]:
        config = recipes.load(f"{engine}/{gpu}")
        rollout, start_s = config.rollout, config.stack.start_timeout_s
        assert start_s >= 1_800 and rollout.serve_timeout_s > start_s and rollout.heartbeat_s <= 60
        assert rollout.max_bake_s > 2 * rollout.bake_s and config.serve.draft_swap == "restart"
    assert "times h100" in {finding.check for finding in check_engine(ENGINES / engine) if finding.passed}


def test_what_older_cards_can_not_serve(tmp_path: Path) -> None:
    old = {"serve": {"a100": {"serve": {**SERVE, "gpu": "a100"}}}}
    mxfp4 = changed("architecture", num_experts=4, experts_per_token=2, expert_bits=4.25)
    assert "Hopper and Blackwell alone" in faults(write_gpu_engine(tmp_path / "engines", mxfp4, old))["serve a100"]
    assert "needs Ada or later" in faults(write_gpu_engine(tmp_path / "engines", {"trtllm": {"kv_dtype": "fp8"}}, old))["serve a100"]


def test_a_draft_and_a_snapshot_that_lie_there_are_looked_at(tmp_path: Path) -> None:
    engine, spec = write_gpu_engine(tmp_path / "engines"), small_spec(tmp_path / "engines")
    write_gpu_draft(engine / "draft", spec, {"max_position_embeddings": 2048})
    assert "a default left in by mistake" in faults(engine)["draft"]
    write_gpu_draft(engine / "draft", spec)
    assert faults(engine) == {} and starting_draft(TideConfig(engine="small", engines_dir=str(engine.parent)), spec) == engine / "draft"
    (engine / "target").mkdir()
    (engine / "target" / "config.json").write_text('{"num_hidden_layers": 13}')
    assert "num_hidden_layers = 12" in faults(engine)["target"] and "says 13" in faults(engine)["target"]


@pytest.mark.parametrize(("folder", "revision"), [("target", ENGINE["revision"]), ("draft", "f" * 40)])
def test_a_snapshot_of_another_revision_is_noticed(folder: str, revision: str, tmp_path: Path) -> None:
    engine = write_gpu_engine(tmp_path / "engines")
    write_gpu_draft(engine / "draft", small_spec(tmp_path / "engines"))
    told = engine / folder / ".cache" / "huggingface" / "download" / "config.json.metadata"      # as `hf download --local-dir` writes it
    told.parent.mkdir(parents=True)
    (engine / folder / "config.json").write_text((engine / folder / "config.json").read_text() if folder == "draft" else "{}")
    told.write_text(f"{revision}\n0a1b\n1790000000.0\n")
    assert faults(engine) == {}
    told.write_text(f"{'e' * 40}\n0a1b\n1790000000.0\n")
    assert f"eeeeeeee, engine.toml names {revision[:8]}" in faults(engine)[folder] and "hf download" in faults(engine)[folder]


def test_a_starting_draft_that_is_not_there_is_told_how_to_get(tmp_path: Path) -> None:
    spec = small_spec(tmp_path / "engines")
    config = TideConfig(engine="small", engines_dir=str(tmp_path / "engines"))
    with pytest.raises(CheckpointError, match=f"hf download owner/small-eagle3 --revision {'f' * 40} .*small/draft"):
        starting_draft(config, spec)
    scratch = replace(spec, draft=replace(spec.draft, repo=""), champion="")
    with pytest.raises(CheckpointError, match="tide train --from-scratch"):
        starting_draft(config, scratch)


def test_an_embedded_engine_without_its_files(tmp_path: Path) -> None:
    plain = {"backend": "embedded", "repo": None, "architecture": None, "draft": None, "capture_layers": [0]}
    found = faults(write_gpu_engine(tmp_path / "engines", plain))
    assert "Put the Hugging Face folder there" in found["target"] and 'Set it to "" for none' in found["draft"] and "layers" in found


# --- recipes -----------------------------------------------------------------------------------------------------

def test_a_recipe_of_two_halves() -> None:
    config = recipes.load("llama-3.3-70b/h100+l40s", values={"serve": {"max_batch": 16}})
    assert (config.engine, config.serve.gpu, config.serve.gpus, config.serve.max_batch, config.training.gpu) == (
        "llama-3.3-70b", "h100", 4, 16, "l40s")
    assert config.training.time_budget_s == 3_600 and recipes.load("qwen3-8b/h200").training.gpu == ""


@pytest.mark.parametrize(("recipe", "message"), [
    ("qwen3-8b/b200", r"no \[serve\.b200\], there are: h100, h200, a100. Add a table"), ("qwen3-8b/h100+t4", r"no \[train\.t4\]"),
    ("qwen4/h100", "no engine 'qwen4'"), ("pocket/h100", r"there are: none"), ("pokcet", "such as qwen3-8b/h100")])
def test_recipes_that_are_not_there(recipe: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        recipes.load(recipe)


# --- the command -------------------------------------------------------------------------------------------------

def tide(*words: str) -> Any:
    return CliRunner().invoke(app, ["engines", *words])


def test_list_check_and_memory_as_json() -> None:
    assert [row["engine"] for row in json.loads(tide("list", "--json").stdout)] == SHIPPED
    assert all(finding["passed"] for finding in json.loads(tide("check", "qwen3-8b", "--json").stdout))
    rows = json.loads(tide("memory", "gpt-oss-120b", "--json").stdout)
    assert [(row["gpus"], row["weights"], row["fits"]) for row in rows] == [(2, 32_624_407_872, True), (1, 65_248_815_744, True)]
    one = json.loads(tide("memory", "llama-3.3-70b", "--gpu", "h100", "--gpus", "1", "--json").stdout)
    assert one[0]["kv_tokens"] == 0 and not one[0]["fits"]


def test_tables_are_for_reading() -> None:
    assert "4 x h100" in tide("memory", "llama-3.3-70b").stdout and "b968826d" in tide("list").stdout
    done = tide("check")
    assert done.exit_code == 0 and "5 engines, all passed" in done.stdout


def test_a_fault_is_a_non_zero_exit(tmp_path: Path) -> None:
    engines = write_gpu_engine(tmp_path / "engines", {"revision": "main"}).parent
    done = tide("check", "--set", f"engines_dir={engines}")
    assert done.exit_code == 1 and "WRONG" in done.stdout and "git ls-remote" in done.stdout.replace("\n", " ") and "1 wrong" in done.stdout
    assert tide("check", "nobody").exit_code == 2 and "there are gpt-oss-120b" in tide("check", "nobody").stderr
    assert tide("memory", "pocket").exit_code == 2
