"""Mixtures of requests, and draft lengths that change between passes, on the stand-in for TensorRT-LLM 1.3: captured whole, bit for bit."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import ask
from tests.serving import Place
from tests.trtllm import KnownNetwork, write_trtllm_place
from tests.trtllm_stand_in import stand_in
from tests.unit.test_trtllm_engine import REQUESTS, LossySink, answer, check_capture, serving
from tide_pipeline.contracts import StepKind
from tide_pipeline.errors import InvalidRequest


def test_a_schedule_decides_by_batch_size_and_rows_follow(tmp_path: Path) -> None:
    with stand_in("1.3"):
        schedule = {"draft_schedule": [[1, 3], [2, 2], [4, 1]]}
        place = write_trtllm_place(tmp_path, "1.3", {"serve": {"max_batch": 4}, "speculation": schedule})
        sink, known = LossySink(), KnownNetwork(place)
        with serving(place, sink) as engine:
            answers = answer(engine, *REQUESTS)
            with pytest.raises(InvalidRequest, match="schedule decides"):
                engine.submit(ask("a", "hello", speculation="3"))
            assert engine.stats().capture_faults == 0
        for request, heard in zip(REQUESTS, answers, strict=True):
            check_capture(sink, request.request_id, [*engine.codec.encode(request.prompt), *heard.tokens], known)
        lengths = {e.draft_length for e in sink.events if e.kind is StepKind.VERIFY}
        assert lengths == {1, 2, 3}


@settings(max_examples=8)
@given(lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 25), st.booleans()), min_size=1, max_size=6))
def test_any_mixture_of_requests_is_captured_whole(lengths: list[tuple[int, int, bool]]) -> None:
    """Chunked prompts among generations: the token budget of a pass is small."""
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(mixture_place())
        sink, known = LossySink(), KnownNetwork(place)
        requests = [ask(f"m{i}", chr(97 + i) * n, max_tokens=m, ignore_eos=ignore) for i, (n, m, ignore) in enumerate(lengths)]
        with serving(place, sink) as engine:
            answers = answer(engine, *requests)
            assert engine.stats().capture_faults == 0
        for request, heard in zip(requests, answers, strict=True):
            check_capture(sink, request.request_id, [*engine.codec.encode(request.prompt), *heard.tokens], known)


@contextlib.contextmanager
def mixture_place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory() as folder, stand_in("1.3"):
        yield write_trtllm_place(Path(folder), "1.3", {"serve": {"max_batch": 3, "queue_size": 6, "prefill_chunk": 16}})
