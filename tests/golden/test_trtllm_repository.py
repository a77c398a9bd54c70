"""The rendered model repository of qwen3-8b on one H100, byte for byte, for every version line of TensorRT-LLM.

To accept a change on purpose: `TIDE_RENEW_GOLDENS=1 pytest tests/golden/test_trtllm_repository.py`, then read the diff.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from tests.trtllm_stand_in import stand_in
from tide_pipeline import recipes
from tide_pipeline.build import trtllm
from tide_pipeline.config import override
from tide_pipeline.engine.trtllm.facts import LINES, load_table
from tide_pipeline.engine_spec import load_engine_spec
from tide_pipeline.serve.repository import render_model_repository

GOLDEN = Path(__file__).parent / "trtllm"
BUILD = Path("/var/lib/tide/builds/qwen3-8b/0123456789abcdef")
FILES = ["qwen3-8b/1/model.py", "qwen3-8b/1/model.yaml", "qwen3-8b/config.pbtxt"]


def render(line: str, into: Path) -> Path:
    config = override(recipes.load("qwen3-8b/h100+l40s"), {"serve": {"trtllm": line}})
    spec, config = load_engine_spec(config.engine_dir), override(config, {"engines_dir": "/opt/tide/engines"})
    return render_model_repository(config, into, replica="replica-0", config_file=BUILD / "settings.toml",
                                   model_yaml=trtllm.model_yaml(config, spec, BUILD / "draft", {}))


@pytest.mark.parametrize("line", LINES)
def test_the_repository_is_the_golden_one(line: str, tmp_path: Path) -> None:
    if os.environ.get("TIDE_RENEW_GOLDENS"):
        render(line, GOLDEN / line)
    place = render(line, tmp_path / "repository")
    assert sorted(str(p.relative_to(place)) for p in place.rglob("*") if p.is_file()) == FILES
    for name in FILES:
        assert (place / name).read_text() == (GOLDEN / line / name).read_text(), f"{line}/{name} has changed: see the docstring"


def test_the_lines_differ_where_nvidia_changed_them() -> None:
    eagle = {line: yaml.safe_load((GOLDEN / line / "qwen3-8b/1/model.yaml").read_text())["speculative_config"] for line in LINES}
    assert eagle["1.2"].keys() - eagle["1.3"].keys() == {"eagle3_one_model", "allow_advanced_sampling", "speculative_model_dir"}
    assert {line: eagle[line]["decoding_type"] for line in LINES} == {"1.2": "Eagle", "1.3": "Eagle3", "1.4": "Eagle3"}
    assert eagle["1.3"] == eagle["1.4"]


@pytest.mark.parametrize("line", LINES)
def test_a_server_that_refuses_unknown_keys_takes_the_golden_arguments(line: str) -> None:
    """The stand-in is generated from the table of facts, so this holds the rendered names against the table, and the yaml against both."""
    arguments = yaml.safe_load((GOLDEN / line / "qwen3-8b/1/model.yaml").read_text())
    del arguments["triton_config"]
    with stand_in(line):
        from tensorrt_llm.llmapi import llm_args

        kinds = load_table(line).nested
        assert arguments["speculative_config"].pop("decoding_type") == load_table(line).names["decoding_type"]     # chooses the class
        nested = {name: getattr(llm_args, kind)(**arguments[name]) for name, kind in kinds.items()}
        taken = llm_args.TorchLlmArgs(**{**arguments, **nested})
        assert taken.max_num_tokens == 8192 and taken.speculative_config.max_draft_len == 3
        with pytest.raises(ValueError, match="max_draft_length"):
            getattr(llm_args, kinds["speculative_config"])(**{**arguments["speculative_config"], "max_draft_length": 3})
