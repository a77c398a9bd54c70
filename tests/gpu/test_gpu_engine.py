"""The engine on a GPU: greedy equivalence, capture, drafts swapped under load.

NOT YET RUN ON A GPU.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.helpers import (
    RecordingSink,
    ask,
    busy,
    drain,
    generate,
    plain_pass,
    submit,
    tiny_engine,
    tiny_spec,
    write_tiny_build,
)
from tide_pipeline.contracts import EngineBuild, FinishReason, StepEvent
from tide_pipeline.engine.embedded import EmbeddedEngine
from tide_pipeline.gate.equivalence import ROUNDING, Equivalence, check_equivalence
from tide_pipeline.models.target import Target

pytestmark = pytest.mark.gpu
REQUESTS = [ask(f"r{i}", "some text " * (1 + i % 4), speculation=how, max_tokens=16 + 4 * i, ignore_eos=True)
            for i, how in enumerate(("auto", "off", "4", "2", "auto", "3", "1"))]


class LossySink(RecordingSink):
    """A step without states is heard of all the same."""

    def on_step(self, events: Sequence[StepEvent]) -> None:
        super().on_step([event for event in events if event.taps is not None])


def engine_on(device: torch.device, folder: Path, build: EngineBuild, sink: RecordingSink | None = None) -> EmbeddedEngine:
    engine = tiny_engine(folder, drafts=build, sink=sink, max_batch=3, device=str(device))
    assert engine.target.device == device and engine.target.dtype == torch.bfloat16
    return engine


def count_ties(target: Target, prompt: Sequence[int], emitted: Sequence[int]) -> int:
    """Every token is the argmax of a plain pass over its prefix, or within rounding of it (counted)."""
    logits = plain_pass(target, [*prompt, *emitted[:-1]])[2][len(prompt) - 1:].float().cpu()
    gap = logits.amax(-1) - logits[torch.arange(len(emitted)), torch.tensor(emitted)]
    assert float(gap.max()) <= ROUNDING * float(logits.abs().max())
    return int((gap > 0).sum())


@pytest.mark.parametrize("profiled", [False, True])
def test_greedy_tokens_are_the_targets(tiny_dir: Path, tiny_build: EngineBuild, device: torch.device, profiled: bool) -> None:
    engine = engine_on(device, tiny_dir, tiny_build)
    if profiled:
        engine.profile()
    answers = generate(engine, *REQUESTS)
    ties = [count_ties(engine.target, engine.codec.encode(request.prompt), answer.tokens)
            for request, answer in zip(REQUESTS, answers, strict=True)]
    assert [len(a.tokens) for a in answers] == [r.sampling.max_tokens for r in REQUESTS]
    assert sum(ties) <= 0.2 * sum(len(a.tokens) for a in answers) and engine.stats().accepted_tokens > 0


def test_the_gate_finds_the_same(tiny_dir: Path, tiny_build: EngineBuild, device: torch.device) -> None:
    """Its check works on a target whose logits are on the GPU: ids from the host, bf16 tolerance, wrong tokens found."""
    engine = engine_on(device, tiny_dir, tiny_build)
    right, wrong = Equivalence(), Equivalence()
    for request, answer in zip(REQUESTS, generate(engine, *REQUESTS), strict=True):
        prompt = engine.codec.encode(request.prompt)
        check_equivalence(engine.target, prompt, answer.tokens, 1e-4, right)
        check_equivalence(engine.target, prompt, [0 if token else 1 for token in answer.tokens], 1e-4, wrong)
    assert right.mismatches == 0 and right.compared == sum(r.sampling.max_tokens for r in REQUESTS) and wrong.mismatches > 0


def test_captured_states_are_those_of_a_plain_pass(tiny_dir: Path, tiny_build: EngineBuild, device: torch.device) -> None:
    sink = LossySink()
    engine = engine_on(device, tiny_dir, tiny_build, sink)
    answers = [submit(engine, request) for request in REQUESTS]
    while busy(engine):
        engine.step()
        torch.cuda.synchronize()                                   # so that no step is dropped, whatever this machine's speed
    engine.close()
    assert engine.stats().dropped_tap_rows == 0 and sink.is_closed
    for request, answer in zip(REQUESTS, answers, strict=True):
        seen, tokens = sink.requests[request.request_id], [*engine.codec.encode(request.prompt), *answer.tokens[:-1]]
        assert seen.row_tokens == tokens and seen.closed is not None
        want = torch.cat(plain_pass(engine.target, tokens)[:2], dim=-1).float().cpu()
        torch.testing.assert_close(seen.rows.float(), want, rtol=2**-5, atol=2**-5 * float(want.abs().max()))


def test_without_waiting_what_is_lost_is_counted(tiny_dir: Path, tiny_build: EngineBuild, device: torch.device) -> None:
    sink = LossySink()
    engine = engine_on(device, tiny_dir, tiny_build, sink)
    answers = generate(engine, *REQUESTS)
    engine.close()
    kept = sum(len(seen.row_tokens) for seen in sink.requests.values())
    consumed = sum(len(engine.codec.encode(r.prompt)) + len(a.tokens) - 1 for r, a in zip(REQUESTS, answers, strict=True))
    assert kept + engine.stats().dropped_tap_rows == consumed and kept > 0


def test_swaps_under_load_fail_nothing_and_leave_no_memory_behind(tiny_dir: Path, tmp_path: Path, device: torch.device) -> None:
    fp32 = Target(tiny_dir, tiny_spec())
    builds = [write_tiny_build(tmp_path / name, fp32, version=name, seed=i) for i, name in enumerate(("v1", "v2"))]
    engine, used = engine_on(device, tiny_dir, builds[0]), []
    for swap in range(24):
        answers = [submit(engine, ask(f"s{swap}-{how}", "some text ", speculation=how, max_tokens=12, ignore_eos=True))
                   for how in ("auto", "3")]
        for _ in range(4):
            engine.step()
        engine.set_drafts({"*": builds[swap % 2]})                  # those in flight keep theirs
        drain(engine)
        for answer in answers:
            assert answer.finish_reason is FinishReason.LENGTH
            count_ties(engine.target, engine.codec.encode("some text "), answer.tokens)
        gc.collect()
        used.append(torch.cuda.memory_allocated(device))
    assert engine.stats().requests_failed == 0 and max(used[12:]) <= 1.1 * max(used[:12])
