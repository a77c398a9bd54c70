"""`tide signals import` by hand: the engine it is held against, what it prints, when it fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from tests.dumps import Said, all_layers, speak, write_modelopt, write_vllm
from tests.helpers import write_tiny_engine
from tide_pipeline import recipes
from tide_pipeline.capture.reader import list_windows
from tide_pipeline.cli import app
from tide_pipeline.config import StatePaths, override
from tide_pipeline.training.data import find_windows
from tide_pipeline.training.look import look_through
from tide_pipeline.training.places import window_reader
from tide_pipeline.training.target_head import target_head_of


@pytest.fixture(scope="module")
def said(tiny_dir: Path) -> list[Said]:
    return speak(tiny_dir, all_layers(tiny_dir), "one prompt", "another prompt")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Settings with the tiny engine."""
    write_tiny_engine(tmp_path / "engines")
    file = tmp_path / "settings.toml"
    file.write_text(f'engine = "tiny"\nengines_dir = "{tmp_path / "engines"}"\n')
    return file


def tide(config: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["signals", "import", *words, "--config", str(config), "--state", str(config.parent / "state")])


def test_a_folder_is_imported_and_told(config: Path, tmp_path: Path, said: list[Said]) -> None:
    folder = write_vllm(tmp_path / "dump", said)
    done = tide(config, str(folder), "--format", "vllm", "--workload", "de", "--tenant", "acme", "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 0 and (found["sequences"], found["windows"], found["layers_checked"]) == (2, 2, True)
    (first, second) = list_windows(StatePaths(config.parent / "state").signals, "tiny").windows
    assert (first.workload, first.tenant, first.temperature) == (second.workload, second.tenant, second.temperature) == ("de", "acme", 1.0)
    told = tide(config, str(write_vllm(tmp_path / "more", speak(config.parent / "engines" / "tiny" / "target", all_layers(
        config.parent / "engines" / "tiny" / "target"), "a third prompt"))), "--format", "vllm").output
    assert "imported 1 sequences" in told and "0 with an answer" in told and "--answer-after" in told
    told = tide(config, str(folder), "--format", "vllm", "--no-check-layers").output
    assert "imported 0 sequences of 2 files" in told and "already in the lake" in told and "layers were not compared" in told


def test_an_answer_begins_after_the_tokens_named(config: Path, tmp_path: Path, said: list[Said]) -> None:
    folder = write_modelopt(tmp_path / "dump", said[:1], mask=False)
    marker = ",".join(map(str, said[0].prompt[-3:]))
    done = tide(config, str(folder), "--format", "modelopt", "--answer-after", marker, "--temperature", "0")
    assert done.exit_code == 0 and "1 with an answer" in done.output
    (window,) = list_windows(StatePaths(config.parent / "state").signals, "tiny").windows
    assert (window.num_prompt_tokens, window.temperature) == (len(said[0].prompt), 0.0)


def test_refused_sequences_make_it_fail(config: Path, tmp_path: Path, said: list[Said]) -> None:
    folder = write_modelopt(tmp_path / "dump", said)
    (folder / "talk-0.pt").write_bytes(b"no zip")
    done = tide(config, str(folder), "--format", "modelopt")
    assert done.exit_code == 1 and "imported 1 sequences" in done.output and "is not a whole file" in done.output
    torch.save({"input_ids": torch.arange(3)}, folder / "talk-1.pt")
    done = tide(config, str(folder), "--format", "modelopt")
    assert done.exit_code == 2 and "nothing in" in done.output and "lacks hidden_states (first talk-1.pt)" in done.output


def test_training_takes_them(config: Path, tmp_path: Path, tiny_dir: Path) -> None:
    """No captured traffic at all: windows from a dump, split by prompt and read with the target's own head."""
    talks = speak(tiny_dir, all_layers(tiny_dir), *[f"question {i}" for i in range(12)])
    assert tide(config, str(write_modelopt(tmp_path / "dump", talks, raw=True)), "--format", "modelopt").exit_code == 0
    settings = override(recipes.load(file=config), {"state_dir": str(config.parent / "state"),
                                                    "training": {"min_prompts": 12, "eval_share": 0.3}})
    head = target_head_of(settings)
    data = look_through(find_windows(settings, "default", head.digest), head, window_reader(settings), 1e9).windows
    assert len(data.focus) + len(data.focus_held_out) == 12 and data.focus_held_out and not data.skipped


@pytest.mark.parametrize(("words", "told"), [
    (("--format", "sglang"), "choose one of trtllm, modelopt, vllm"),
    (("--format", "vllm"), "holds no *.safetensors"),
    (("--format", "vllm", "--answer-after", "<|assistant|>"), "expected token ids"),
    (("--format", "vllm", "--tenant", "shy", "--set", 'capture.opted_out_tenants=["shy"]'), "nothing of theirs is stored"),
])
def test_what_cannot_be_meant(words: tuple[str, ...], told: str, config: Path, tmp_path: Path) -> None:
    done = tide(config, str(tmp_path / "dump"), *words)
    assert done.exit_code == 2 and told in done.output
