"""The stand-in is strict where NVIDIA's package is strict, and serves so that an adapter can be tested on it."""

from __future__ import annotations

import ast
import asyncio
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.trtllm_stand_in import VERSIONS, stand_in, write_stand_in
from tide_pipeline.engine.trtllm.facts import ANY, LINES, load_table

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


@pytest.fixture(params=LINES)
def line(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def speculative(line: str) -> dict[str, Any]:
    return {"max_draft_len": 3, "speculative_model_dir" if line == "1.2" else "speculative_model": "draft"}


@pytest.fixture
def package(line: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("TLLM_WORKER_USE_SINGLE_PROCESS", "1")
    with stand_in(line) as module:
        yield module


def test_it_is_there_for_its_time_only(line: str) -> None:
    with stand_in(line) as module:
        assert module.__version__ == VERSIONS[line]
        with pytest.raises(AssertionError, match="is there already"), stand_in(line):
            pass
    assert "tensorrt_llm" not in sys.modules
    with pytest.raises(ModuleNotFoundError):
        __import__("tensorrt_llm")


def test_defaults_are_those_of_the_table(line: str, package: Any) -> None:
    from tensorrt_llm.llmapi import llm_args

    for fact in load_table(line).facts:
        if fact.kind == "model":
            cls = getattr(llm_args, fact.name)
            known = {name: getattr(cls, name) for name in cls.__class_vars__} | {k: v.default for k, v in cls.model_fields.items()}
            assert set(known) == set(fact.fields)
            for name, value in fact.fields.items():
                if value.default not in (None, ANY):
                    assert known[name] == ast.literal_eval(value.default), name


def test_unknown_and_foreign_arguments_are_refused(line: str, package: Any, speculative: dict[str, Any]) -> None:
    foreign = {"1.2": "acceptance_rate_threshold", "1.3": "eagle4", "1.4": "acceptance_window"}[line]
    for arguments in ({"max_bach_size": 8}, {"kv_cache_config": {"fraction": 0.5}}, {"speculative_config": {**speculative, foreign: 1}},
                      {"speculative_config": {"max_draft_len": 3}}):
        with pytest.raises(ValueError, match=r"Extra inputs are not permitted|draft model must be provided"):
            package.LLM(model="m", **arguments)


def test_1_2_has_a_class_and_a_field_of_its_own_for_the_draft(line: str, package: Any) -> None:
    """There the class itself is the decoding type: it refuses to be told."""
    from tensorrt_llm.llmapi import llm_args

    older = {"max_draft_len": 3, "speculative_model_dir": "draft"}
    if line == "1.2":
        assert llm_args.EagleDecodingConfig(**older).decoding_type == "Eagle" and not hasattr(llm_args, "Eagle3DecodingConfig")
        with pytest.raises(ValueError, match=r"decoding_type\n  Extra inputs are not permitted"):
            llm_args.EagleDecodingConfig(**older, decoding_type="Eagle")
    else:
        with pytest.raises(ValueError, match="speculative_model_dir"):
            package.LLM(model="m", speculative_config=older)


def test_a_stream_grows_to_the_same_answer_as_without_speculation(package: Any, speculative: dict[str, Any]) -> None:
    async def stream(llm: Any) -> list[list[int]]:
        output = llm.generate_async(PROMPT, package.SamplingParams(max_tokens=20), streaming=True)
        seen = [list(it.outputs[0].token_ids) async for it in output]
        assert output.finished and output.outputs[0].finish_reason == "length"
        assert output.avg_decoded_tokens_per_iter == pytest.approx(20 / len(seen))
        return seen

    with package.LLM(model="m", speculative_config=speculative) as llm:
        drafted = asyncio.run(stream(llm))
    with package.LLM(model="m") as llm:
        plain = asyncio.run(stream(llm))
    assert all(after[: len(before)] == before for before, after in itertools.pairwise(drafted))
    assert drafted[-1] == plain[-1] and len(drafted) < len(plain) == 20


def test_it_ends_at_the_end_token_or_when_it_is_told_to(package: Any, speculative: dict[str, Any]) -> None:
    with package.LLM(model="m", speculative_config=speculative) as llm:
        whole = llm.generate_async(PROMPT, package.SamplingParams(max_tokens=12)).result(30).outputs[0].token_ids
        stopped = llm.generate_async(PROMPT, package.SamplingParams(max_tokens=12, end_id=whole[5])).result(30).outputs[0]
        assert (stopped.token_ids, stopped.finish_reason) == (whole[: whole.index(whole[5]) + 1], "stop")
        endless = llm.generate_async(PROMPT, package.SamplingParams(max_tokens=100_000), streaming=True)
        endless.abort()
        assert endless.result(30).outputs[0].finish_reason == "cancelled" and endless.aborted()
        with pytest.raises(ValueError, match="max_num_tokens"):
            llm.generate_async([1] * 9000)


def test_a_prefix_is_computed_once(package: Any, speculative: dict[str, Any]) -> None:
    with package.LLM(model="m", speculative_config=speculative) as llm:
        from tensorrt_llm._torch.pyexecutor.model_engine import PyTorchModelEngine

        starts, forward = [], PyTorchModelEngine.forward
        PyTorchModelEngine.forward = lambda engine, batch, *rest: (
            starts.extend(r.context_current_position for r in batch.context_requests), forward(engine, batch, *rest))[1]
        answers = [llm.generate_async(PROMPT, package.SamplingParams(max_tokens=5)).result(30).outputs[0].token_ids for _ in range(2)]
    assert starts == [0, 8] and answers[0] == answers[1]


def test_the_draft_length_follows_the_function_that_is_there(line: str, package: Any, speculative: dict[str, Any]) -> None:
    if line == "1.2":
        pytest.skip("fixed on this line")
    from tensorrt_llm._torch.speculative import utils

    asked = []
    utils.get_draft_len_for_batch_size = lambda schedule, batch_size, longest, **floor: asked.append((batch_size, longest, *floor)) or 1
    with package.LLM(model="m", speculative_config={**speculative, "draft_len_schedule": {8: 3}}) as llm:
        llm.generate_async(PROMPT, package.SamplingParams(max_tokens=6)).result(30)
        assert llm._engine.model_engine.runtime_draft_len == 1 and asked[0] == (1, 3, *(["min_draft_len"] if line == "1.4" else []))


def test_statistics_of_every_pass(line: str, package: Any, speculative: dict[str, Any]) -> None:
    async def read(llm: Any) -> list[dict[str, Any]]:
        return [entry async for entry in llm.get_stats_async(0.05)]

    with package.LLM(model="m", speculative_config=speculative, enable_iter_perf_stats=True) as llm:
        llm.generate_async(PROMPT, package.SamplingParams(max_tokens=20)).result(30)
        entries = asyncio.run(read(llm))
    names = load_table(line).names
    assert all(set(names["spec_stats_keys"]) == set(entry[names["spec_stats"]]) for entry in entries)
    assert sum(entry["specDecodingStats"]["numAcceptedTokens"] for entry in entries) > 0


def test_another_process_finds_it_on_its_path(tmp_path: Path) -> None:
    """As Triton's Python stub does."""
    write_stand_in(tmp_path, "1.3")
    code = ("from tensorrt_llm import LLM, SamplingParams\nllm = LLM(model='m')\n"
            "print(len(llm.generate_async([1, 2], SamplingParams(max_tokens=4)).result(60).outputs[0].token_ids))\nllm.shutdown()")
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path, capture_output=True,
                          text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr[-2000:]
