"""engine.toml as arguments of LLM(**), by what each version line calls things."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.gpu_engines import small_config, small_spec
from tests.trtllm_stand_in import stand_in
from tide_pipeline.config import TideConfig, override
from tide_pipeline.engine.trtllm.facts import LINES, Fact, Field, Table, load_table
from tide_pipeline.engine.trtllm.installed import fields_of, what_is_wrong
from tide_pipeline.engine.trtllm.model_yaml import render_model_yaml
from tide_pipeline.engine.trtllm.options import LATCHES, llm_arguments, translate_schedule, unverified
from tide_pipeline.engine_spec import EngineSpec, TrtllmSettings
from tide_pipeline.errors import SettingsError


@pytest.fixture
def spec(tmp_path: Path) -> EngineSpec:
    return small_spec(tmp_path)


@pytest.fixture
def config(tmp_path: Path, spec: EngineSpec) -> TideConfig:
    return small_config(tmp_path / spec.name, tmp_path / "state")


def without(table: Table, model: str, field: str, **instead: Field) -> Table:
    """The table of a version in which the class does not have the field, but others `instead`."""
    def changed(fact: Fact) -> Fact:
        return replace(fact, fields={**{k: v for k, v in fact.fields.items() if k != field}, **instead}) if fact.name == model else fact

    return replace(table, facts=tuple(map(changed, table.facts)))


@pytest.mark.parametrize("line", LINES)
def test_what_every_line_gets(line: str, spec: EngineSpec, config: TideConfig) -> None:
    found = llm_arguments(spec, config, load_table(line), draft="/builds/draft")
    eagle = found.pop("speculative_config")
    assert found == {
        "model": "owner/small", "revision": spec.revision, "dtype": "auto", "tensor_parallel_size": 1, "max_batch_size": 8,
        "max_num_tokens": 1024, "max_seq_len": 4096, "enable_chunked_prefill": True, "stream_interval": 1, "enable_iter_perf_stats": True,
        "kv_cache_config": {"free_gpu_memory_fraction": 0.85, "enable_block_reuse": True, "dtype": "auto"},
        "cuda_graph_config": {"batch_sizes": [1, 2, 4, 8], "enable_padding": True}}
    own: dict[str, Any] = {"decoding_type": "Eagle3", "speculative_model": "/builds/draft"}
    if line == "1.2":
        own = {"decoding_type": "Eagle", "speculative_model_dir": "/builds/draft"}
        own |= {"eagle3_one_model": True, "allow_advanced_sampling": True}
    assert eagle == {"max_draft_len": 3, "eagle3_layers_to_capture": [1, 5, 8], **own}


@pytest.mark.parametrize("line", LINES)
def test_every_name_is_one_that_the_line_has(line: str, spec: EngineSpec, config: TideConfig) -> None:
    found = llm_arguments(spec, config, load_table(line), draft="d", worker_extension="a.B")
    nested = {"KvCacheConfig": found["kv_cache_config"], "CudaGraphConfig": found["cuda_graph_config"],
              load_table(line).nested["speculative_config"]: found["speculative_config"], "TorchLlmArgs": found}
    for name, values in nested.items():
        assert values.keys() <= load_table(line).fields(name).keys()
    assert not set(LATCHES) & json.loads(json.dumps(found["speculative_config"])).keys(), "the one-way gate stays unset"


def test_plain_serving_ray_and_a_local_snapshot(spec: EngineSpec, config: TideConfig) -> None:
    ray = replace(spec, trtllm=TrtllmSettings(orchestrator="ray", kv_dtype="fp8", kv_reuse=False, stream_interval=4))
    found = llm_arguments(ray, override(config, {"serve": {"gpus": 2}}), load_table("1.3"), draft=None, model="/models/small",
                          worker_extension="package.module.Class")
    assert "speculative_config" not in found and "revision" not in found and found["model"] == "/models/small"
    assert (found["orchestrator_type"], found["ray_worker_extension_cls"]) == ("ray", "package.module.Class")
    assert (found["tensor_parallel_size"], found["stream_interval"]) == (2, 4)
    assert found["kv_cache_config"]["dtype"] == "fp8" and not found["kv_cache_config"]["enable_block_reuse"]


def test_the_step_holds_every_draft_token(spec: EngineSpec, config: TideConfig) -> None:
    wide = override(config, {"serve": {"max_batch": 400}, "speculation": {"max_draft_length": 2}})
    found = llm_arguments(spec, wide, load_table("1.3"), draft="d")
    assert found["speculative_config"]["max_draft_len"] == 2 and found["max_num_tokens"] == 400 * 3


@pytest.mark.parametrize(("model", "field"), [
    ("TorchLlmArgs", "max_seq_len"), ("KvCacheConfig", "free_gpu_memory_fraction"), ("CudaGraphConfig", "enable_padding"),
    ("Eagle3DecodingConfig", "max_draft_len"), ("Eagle3DecodingConfig", "speculative_model")])
def test_a_missing_field_is_told_with_what_to_do(model: str, field: str, spec: EngineSpec, config: TideConfig) -> None:
    with pytest.raises(SettingsError, match=rf"TensorRT-LLM 1\.3: {model} has no field '{field}'.*facts/1\.3\.toml.*tide doctor"):
        llm_arguments(spec, config, without(load_table("1.3"), model, field), draft="d")


def test_a_renamed_field_is_followed_by_its_alias(spec: EngineSpec, config: TideConfig) -> None:
    table = without(load_table("1.3"), "Eagle3DecodingConfig", "speculative_model",
                    speculative_model=Field("None", alias=("speculative_model_dir",)))
    installed = {"Eagle3DecodingConfig": {"decoding_type", "max_draft_len", "eagle3_layers_to_capture", "speculative_model_dir"}}
    found = llm_arguments(spec, config, table, draft="d", installed=installed)
    assert found["speculative_config"]["speculative_model_dir"] == "d" and "speculative_model" not in found["speculative_config"]


def test_a_draft_finds_its_way_before_and_after_its_folder_was_renamed(spec: EngineSpec, config: TideConfig) -> None:
    """1.2 has `speculative_model_dir`; later texts keep that as an alias. `decoding_type` is the class's, and known all the same."""
    table, name = load_table("1.2"), "EagleDecodingConfig"
    renamed = without(table, name, "speculative_model_dir", speculative_model=Field("None", alias=("speculative_model_dir",)))
    for there in (table, renamed):
        with stand_in("1.2", there):
            from tensorrt_llm.llmapi import llm_args

            installed = fields_of(table)
            assert what_is_wrong(table, "fatal") == [] and {"decoding_type", "speculative_model_dir"} <= installed[name]
            eagle = llm_arguments(spec, config, table, draft="d", installed=installed)["speculative_config"]
            assert (eagle.pop("decoding_type"), eagle["speculative_model_dir"]) == ("Eagle", "d")
            taken = getattr(llm_args, name)(**eagle)
            assert taken.decoding_type == "Eagle" and "d" in taken.model_dump().values()
    with stand_in("1.2", without(table, name, "speculative_model_dir")):
        assert what_is_wrong(table, "fatal") == [f"{name}: no field speculative_model_dir"]


def test_installed_classes_have_the_last_word(spec: EngineSpec, config: TideConfig) -> None:
    eagle = set(load_table("1.3").fields("Eagle3DecodingConfig"))
    found = llm_arguments(spec, config, load_table("1.3"), draft="d", installed={"Eagle3DecodingConfig": eagle | {"eagle3_one_model"}})
    assert found["speculative_config"]["eagle3_one_model"] is True
    with pytest.raises(SettingsError, match="has no field 'stream_interval'"):
        llm_arguments(spec, config, load_table("1.3"), draft="d", installed={"TorchLlmArgs": set(found) - {"stream_interval"}})


def test_a_schedule_means_the_same_on_every_line(spec: EngineSpec, config: TideConfig) -> None:
    found = llm_arguments(spec, config, load_table("1.3"), draft="d", schedule={2: 3, 4: 2, 8: 1})
    assert found["speculative_config"]["draft_len_schedule"] == {2: 3, 4: 2, 8: 1}
    assert translate_schedule({2: 3, 4: 2, 8: 1}, "from", 3, 8) == {1: 3, 3: 2, 5: 1}
    for batch in range(1, 9):                                    # read as NVIDIA reads them
        upto, since = {2: 3, 4: 2, 8: 1}, {1: 3, 3: 2, 5: 1}
        assert upto[min(k for k in upto if k >= batch)] == since[max(k for k in since if k <= batch)]


def test_a_schedule_that_begins_with_less_is_what_is_drafted_at_most(spec: EngineSpec, config: TideConfig) -> None:
    """NVIDIA's validator: the length at the smallest key must be max_draft_len."""
    found = llm_arguments(spec, config, load_table("1.3"), draft="d", schedule={4: 2, 8: 1})["speculative_config"]
    assert (found["max_draft_len"], found["draft_len_schedule"]) == (2, {4: 2, 8: 1})


@pytest.mark.parametrize(("schedule", "message"), [
    ({4: 3}, r"ends before serve.max_batch = 8.*Add 8: 1"), ({}, "Add 8: 1"), ({4: 3, 8: 0}, "goes stale"), ({4: 1, 8: 3}, "must fall"),
    ({4: 9, 8: 1}, "at most 3"), ({0: 3, 8: 1}, "ends before")])
def test_schedules_that_would_hurt_are_refused(schedule: dict[int, int], message: str, spec: EngineSpec, config: TideConfig) -> None:
    with pytest.raises(SettingsError, match=message):
        llm_arguments(spec, config, load_table("1.3"), draft="d", schedule=schedule)


def test_a_line_without_control_of_the_length_says_what_to_do(spec: EngineSpec, config: TideConfig) -> None:
    with pytest.raises(SettingsError, match=r"1\.2 can't change the draft length.*plain replicas"):
        llm_arguments(spec, config, load_table("1.2"), draft="d", schedule={8: 3})


def test_extra_arguments_go_through_where_nothing_contradicts(spec: EngineSpec, config: TideConfig) -> None:
    extra: dict[str, Any] = {"attn_backend": "FLASHINFER", "moe_config": {"backend": "TRITON"}, "kv_cache_config": {"host_cache_size": 1}}
    mine = replace(spec, trtllm=TrtllmSettings(extra=extra))
    found = llm_arguments(mine, config, load_table("1.3"), draft="d")
    assert found["attn_backend"] == "FLASHINFER" and found["moe_config"] == {"backend": "TRITON"}
    assert found["kv_cache_config"] == {"free_gpu_memory_fraction": 0.85, "enable_block_reuse": True, "dtype": "auto", "host_cache_size": 1}
    assert unverified(mine, load_table("1.3")) == ["moe_config"]


@pytest.mark.parametrize(("extra", "message"), [
    ({"max_seq_len": 1}, "follows from other settings"), ({"kv_cache_config": {"dtype": "fp8"}}, "follows from other settings"),
    ({"atn_backend": "X"}, "did you mean 'attn_backend'"), ({"speculative_config": {"acceptance_window": 100}}, "never on again"),
    ({"speculative_config": {"acceptance_rate_threshold": 0.5}}, "never on again")])
def test_extra_arguments_that_would_hurt_are_refused(extra: dict[str, Any], message: str, spec: EngineSpec, config: TideConfig) -> None:
    with pytest.raises(SettingsError, match=message):
        llm_arguments(replace(spec, trtllm=TrtllmSettings(extra=extra)), config, load_table("1.3"), draft="d")


@pytest.mark.parametrize("line", LINES)
def test_model_yaml_says_what_llm_is_given(line: str, spec: EngineSpec, config: TideConfig) -> None:
    schedule = {8: 3} if line != "1.2" else None
    arguments = llm_arguments(spec, config, load_table(line), draft="/a place/draft: 1", schedule=schedule)
    read = yaml.safe_load(render_model_yaml(arguments, line))
    assert read.pop("triton_config") == {"max_batch_size": 0, "decoupled": True}
    assert read == arguments
