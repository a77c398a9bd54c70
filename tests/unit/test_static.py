"""Passes of fixed shape give what ordinary passes give, on any schedule; what pads them leaves no trace. Graphs are stood in for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import (
    RecordingSink,
    agreeing_draft,
    ask,
    assert_states_match,
    count_ties,
    generate,
    tiny_engine,
    tiny_spec,
    write_tiny_target,
)
from tide_pipeline.contracts import EngineBuild
from tide_pipeline.models.eagle3 import DraftRunner
from tide_pipeline.models.layers import KVCache
from tide_pipeline.models.static import Bucket, Outputs, StaticPasses
from tide_pipeline.models.target import Target

SLOTS, POSITIONS, WIDEST = 6, 640, 4
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
EAGER, REPLAYED = "eager", "replayed"


class ReplayedGraphs:
    """Behaves as CUDA graphs do for their owner: a capture gives nothing, every replay writes the same outputs anew."""

    def __init__(self) -> None:
        self.captured = 0

    def capture(self, run: Callable[[], Outputs]) -> tuple[_Replay, Outputs]:
        self.captured += 1
        outputs = tuple(torch.full_like(output, torch.nan) for output in run())
        return _Replay(run, outputs), outputs


class _Replay:
    def __init__(self, run: Callable[[], Outputs], outputs: Outputs) -> None:
        self._run, self._outputs = run, outputs

    def replay(self) -> None:
        for buffer, output in zip(self._outputs, self._run(), strict=True):
            buffer.copy_(output)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = write_tiny_target(tmp_path_factory.mktemp("static") / "target", context=1.0, max_positions=POSITIONS)
    return Target(folder, tiny_spec(max_context=POSITIONS, max_draft_length=WIDEST - 1))


def static_cache(target: Target | DraftRunner, how: str, slots: int = SLOTS, limit: int = 256) -> KVCache:
    cache = target.new_cache(slots, POSITIONS)
    assert cache.static is None                                     # on a host, unless asked for
    cache.static = StaticPasses(target._pass, WIDEST, ReplayedGraphs() if how == REPLAYED else None, limit)
    return cache


STEPS = st.lists(st.lists(st.integers(1, WIDEST), min_size=1, max_size=SLOTS), min_size=1, max_size=8)
STARTS = st.lists(st.sampled_from([0, 3, 250, 255, 300, 510]), min_size=SLOTS, max_size=SLOTS)


@pytest.mark.parametrize("how", [EAGER, REPLAYED])
@settings(max_examples=8)
@given(starts=STARTS, steps=STEPS, data=st.data())
def test_a_static_schedule_of_the_target_equals_the_ordinary_one(target: Target, how: str, starts: list[int], steps: list[list[int]],
                                                                   data: st.DataObject) -> None:
    """Requests of any lengths, refused rows, batches that grow and shrink: taps, final states, logits, and every row of the cache."""
    plain, static = target.new_cache(SLOTS, POSITIONS), static_cache(target, how)
    for slot, length in enumerate(starts):
        if length:                                                  # a prompt chunk: too wide for the buckets
            ids, positions = torch.randint(1, 200, (length,), generator=torch.Generator().manual_seed(slot)), torch.arange(length)
            for cache in (plain, static):
                target.forward_rows(ids, positions, [length], cache, first_slot=slot)
    static.rows[:, static.scratch] = torch.nan                      # whoever reads it tells
    ends = list(starts)
    for number, widths in enumerate(steps):
        ids = torch.randint(1, 200, (sum(widths),), generator=torch.Generator().manual_seed(number))
        positions = torch.tensor([ends[slot] + j for slot, width in enumerate(widths) for j in range(width)])
        before = static.rows.clone()
        got, want = (target.forward_rows(ids, positions, widths, cache) for cache in (static, plain))
        for ours, theirs in zip((*got, target.logits(got[1])), (*want, target.logits(want[1])), strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)
        torch.testing.assert_close(static.rows[:, : static.scratch], plain.rows[:, : plain.scratch], **CLOSE)
        written = torch.cat([torch.tensor([slot]).repeat(width) for slot, width in enumerate(widths)]) * POSITIONS + positions
        untouched = torch.ones(static.scratch, dtype=torch.bool).index_fill_(0, written, False)
        assert torch.equal(static.rows[:, : static.scratch][:, untouched], before[:, : static.scratch][:, untouched])
        for slot, width in enumerate(widths):
            ends[slot] = min(ends[slot] + data.draw(st.integers(1, width)), POSITIONS - WIDEST)


@pytest.mark.parametrize("how", [EAGER, REPLAYED])
@settings(max_examples=8)
@given(steps=st.lists(st.lists(st.integers(0, WIDEST), min_size=1, max_size=SLOTS).filter(any), min_size=1, max_size=6))
def test_a_static_schedule_of_the_draft_equals_the_ordinary_one(target: Target, how: str, steps: list[list[int]]) -> None:
    """Requests with true taps of any number of rows, none included, then a drafted token for each."""
    runner = DraftRunner(agreeing_draft(target), target.embedding_VD)
    caches, ends = [runner.new_cache(SLOTS, POSITIONS), static_cache(runner, how)], [0] * SLOTS
    generator = torch.Generator().manual_seed(1)
    for widths in steps:
        taps = torch.randn(sum(widths), 3 * target.shape.hidden_size, generator=generator)
        ids = torch.randint(1, 200, (sum(widths),), generator=generator)
        positions = torch.tensor([ends[slot] + j for slot, width in enumerate(widths) for j in range(width)])
        extended = [runner.extend(taps, ids, positions, widths, cache) for cache in caches]
        torch.testing.assert_close(*extended, **CLOSE)
        ends = [end + width for end, width in zip(ends, [*widths, *[0] * SLOTS], strict=False)]
        state, B = torch.randn(len(widths), target.shape.hidden_size, generator=generator), len(widths)
        stepped = [runner.step(state, torch.arange(1, 1 + B), torch.tensor(ends[:B]), cache) for cache in caches]
        torch.testing.assert_close(*stepped, **CLOSE)
        torch.testing.assert_close(*(cache.rows[:, : cache.scratch] for cache in caches), **CLOSE)


def test_slots_that_are_not_in_a_step_are_read_by_nobody(target: Target) -> None:
    """The bucket is wider than the step; the slots behind it hold NaN, and so does the scratch row."""
    caches = [target.new_cache(SLOTS, POSITIONS), static_cache(target, EAGER)]
    caches[1].rows[:, 3 * POSITIONS :] = torch.nan
    for widths in ([1, 1, 1], [2, 1, 3]):
        ids, positions = torch.arange(1, 1 + sum(widths)), torch.tensor([5 + j for width in widths for j in range(width)])
        got, want = (target.forward_rows(ids, positions, widths, cache) for cache in reversed(caches))
        torch.testing.assert_close(got, want, **CLOSE)


# --- buckets -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("widths", "context", "want"), [
    ([1], 1, Bucket(1, 1, 256)), ([1] * 3, 256, Bucket(4, 4, 256)), ([1] * 5, 257, Bucket(8, 8, 512)),
    ([1] * 60, 900, Bucket(64, 64, 1024)),
    ([2], 1, Bucket(1, 2, 256)), ([1, 0, 1], 1, Bucket(4, 8, 256)),
    ([1, 2, 1], 1, Bucket(4, 8, 256)), ([6] * 3, 1, Bucket(4, 20, 256)), ([6] * 4, 1, Bucket(4, 24, 256)),
    ([1] * 65, 1100, Bucket(65, 65, 1280)), ([1], 2049, Bucket(1, 1, 2560)), ([1], 4000, Bucket(1, 1, 4000))])
def test_buckets(widths: list[int], context: int, want: Bucket) -> None:
    assert Bucket.of(widths, context, slots=65, positions=4000) == want


@settings(max_examples=100)
@given(widths=st.lists(st.integers(0, WIDEST), min_size=1, max_size=33).filter(any), context=st.integers(1, 5000))
def test_a_step_fits_its_bucket(widths: list[int], context: int) -> None:
    bucket = Bucket.of(widths, context, slots=33, positions=5000)
    assert len(widths) <= bucket.batch <= 33 and bucket.batch < 2 * len(widths)
    assert sum(widths) <= bucket.rows <= bucket.batch * max(2, max(widths))
    assert context <= bucket.context <= min(5000, max(context + 256, context * 1.25))
    assert (bucket.rows == bucket.batch) == (set(widths) == {1})


def test_a_bucket_is_captured_once_and_the_least_used_one_goes_first(target: Target) -> None:
    cache = static_cache(target, REPLAYED, limit=2)
    static = cache.static
    assert static is not None and isinstance(static._graphs, ReplayedGraphs)

    def step(batch: int) -> Tensor:
        return target.forward_rows(torch.ones(batch, dtype=torch.long), torch.full((batch,), 7), [1] * batch, cache)[1]

    first = step(1)
    for batch in (2, 1, 1, 2):
        step(batch)
    assert static._graphs.captured == 2 and [b.batch for b in static.buckets] == [1, 2]
    step(4)
    assert static._graphs.captured == 3 and [b.batch for b in static.buckets] == [2, 4]
    assert torch.equal(step(1), first) and static._graphs.captured == 4


def test_what_a_step_returned_is_the_callers(target: Target) -> None:
    """No later replay of its graph writes over it."""
    cache, steps = static_cache(target, REPLAYED), []
    for token in range(1, 6):
        steps.append(target.forward_rows(torch.tensor([token, token]), torch.tensor([9, 9]), [1, 1], cache))
    for token, got in enumerate(steps, start=1):
        want = target.forward_rows(torch.tensor([token, token]), torch.tensor([9, 9]), [1, 1], target.new_cache(2, POSITIONS))
        torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("how", [EAGER, REPLAYED])
def test_an_engine_over_static_passes_is_exact(tiny_dir: Path, tiny_target: Target, tiny_build: EngineBuild, how: str) -> None:
    """Requests of every kind side by side, drafts included: greedy tokens are the target's, captured states those of a plain pass."""
    sink = RecordingSink()
    engine = tiny_engine(tiny_dir, drafts=tiny_build, sink=sink, max_batch=3)
    graphs = ReplayedGraphs() if how == REPLAYED else None
    draft = engine._drafts["*"]
    engine.cache.static = StaticPasses(engine.target._pass, 5, graphs)
    draft.cache.static = StaticPasses(draft.runner._pass, 8, graphs)
    if how == REPLAYED:
        engine.profile()                                            # on the same caches: what it leaves there nobody may read
    requests = [ask(f"r{i}", "a prompt " * (1 + i % 3), speculation=speculation, max_tokens=14 + 5 * i, ignore_eos=True,
                    temperature=0.8 if i == 2 else 0.0) for i, speculation in enumerate(("auto", "off", "4", "2", "auto", "3"))]
    answers = generate(engine, *requests)
    for request, answer in zip(requests, answers, strict=True):
        prompt = engine.codec.encode(request.prompt)
        assert len(answer.tokens) == request.sampling.max_tokens
        if request.sampling.temperature == 0.0:
            count_ties(tiny_target, prompt, answer.tokens)
        assert_states_match(tiny_target, [*prompt, *answer.tokens[:-1]], sink.requests[request.request_id].rows)
    assert engine.stats().accepted_tokens > 0 and len(engine.cache.static.buckets) > 3 and draft.cache.static.buckets
    if graphs is not None:
        assert graphs.captured == len(engine.cache.static.buckets) + len(draft.cache.static.buckets)


class NoGraphs:
    def capture(self, run: Callable[[], Outputs]) -> tuple[_Replay, Outputs]:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


def test_where_no_graph_can_be_captured_passes_run_as_they_are(target: Target, caplog: pytest.LogCaptureFixture) -> None:
    cache = static_cache(target, EAGER)
    cache.static = StaticPasses(target._pass, WIDEST, NoGraphs())
    with caplog.at_level(logging.ERROR):
        for token in (1, 2, 2):
            got = target.forward_rows(torch.tensor([token]), torch.tensor([3]), [1], cache)
            want = target.forward_rows(torch.tensor([token]), torch.tensor([3]), [1], target.new_cache(1, POSITIONS))
            torch.testing.assert_close(got, want, **CLOSE)
    assert [record.message for record in caplog.records] == [
        "a pass could not be captured as a CUDA graph: serving goes on without new graphs, more slowly"]


def test_warming_up_captures_what_steps_need_and_writes_nothing(target: Target) -> None:
    cache = static_cache(target, REPLAYED)
    static = cache.static
    assert static is not None and isinstance(static._graphs, ReplayedGraphs)
    static.warm(cache, batch=5, context=512)
    assert not cache.rows[:, : cache.scratch].any() and cache.rows[:, cache.scratch].any()
    warmed = static._graphs.captured
    assert {b.batch for b in static.buckets} == {1, 2, 4, 6} and {b.context for b in static.buckets} == {256, 512}
    for widths in ([1] * 5, [WIDEST] * 3, [1, WIDEST], [2], [1, 1, 2, 1, 1]):
        target.forward_rows(torch.ones(sum(widths), dtype=torch.long), torch.full((sum(widths),), 300), widths, cache)
    assert static._graphs.captured == warmed


def test_an_engine_warms_up_before_it_serves(tiny_dir: Path) -> None:
    engine, graphs = tiny_engine(tiny_dir, max_batch=2), ReplayedGraphs()
    engine.cache.static = StaticPasses(engine.target._pass, 5, graphs)
    engine.start()
    try:
        assert {(b.batch, b.rows) for b in engine.cache.static.buckets} == {(B, B * per) for B in (1, 2) for per in range(1, 6)}
        warmed = graphs.captured
        stream = engine.submit(ask("r", "a prompt", max_tokens=5, ignore_eos=True))
        assert len([token for chunk in stream for token in chunk.token_ids]) == 5 and graphs.captured == warmed
    finally:
        engine.close()


def test_prompt_chunks_and_single_slots_take_the_ordinary_way(target: Target) -> None:
    static = StaticPasses(target._pass, WIDEST)
    assert static.takes([1, WIDEST], 0) and not static.takes([WIDEST + 1], 0) and not static.takes([1], 3)
