"""A draft put into a running server, and workers reached as through Ray: the adapter on the stand-in, whose answers travel pickled.

What can't run here: NVIDIA's own load_draft_weights, captured graphs, Ray itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import Answer, ask
from tests.serving import Place, until
from tests.trtllm import KnownNetwork, write_trtllm_place
from tests.trtllm_stand_in import stand_in
from tests.unit.test_trtllm_engine import RAY, REQUESTS, LossySink, answer, check_capture, serving
from tide_pipeline.contracts import EngineBuild
from tide_pipeline.engine.trtllm import engine as engine_module
from tide_pipeline.engine.trtllm.engine import TrtllmEngine
from tide_pipeline.engine.trtllm.ray_worker import TideWorker
from tide_pipeline.errors import BuildError, RestartNeeded

IN_PLACE = {"serve": {"max_batch": 4, "queue_size": 6, "draft_swap": "in_place"}}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with stand_in("1.3"):
        yield write_trtllm_place(tmp_path, "1.3", IN_PLACE)


def model_of(engine: TrtllmEngine) -> Any:
    """What the server holds of its draft."""
    return engine._server._llm._engine.model_engine.model


def holds(engine: TrtllmEngine, build: EngineBuild) -> bool:
    wanted = load_file(Path(build.path) / "draft" / "model.safetensors")["fc.weight"]
    return torch.equal(model_of(engine).draft_model.fc.weight, wanted.bfloat16())


def test_a_draft_put_in_place_is_served_from_the_next_request_on(place: Place) -> None:
    """Requests in flight end with the draft they began with; those that come meanwhile wait; nobody is refused."""
    sink, known = LossySink(), KnownNetwork(place)
    with serving(place, sink) as engine:
        second = place.build("v2-two", noise=0.3, seed=3)
        before = [Answer() for _ in range(4)]
        for i, heard in enumerate(before):
            engine.submit(ask(f"old-{i}", "hello world", max_tokens=300, ignore_eos=True), heard)
        until(lambda: engine.stats().running == 4)
        late = Answer()
        swap = threading.Thread(target=engine.set_drafts, args=({"*": second},))
        swap.start()
        until(lambda: engine._is_paused or not swap.is_alive())
        engine.submit(ask("late", "hello world", max_tokens=5, ignore_eos=True), late)
        swap.join(60)
        until(lambda: bool(late.finish_reason))
        assert all(len(heard.tokens) == 300 and heard.last.draft_version == "v1" for heard in before)
        assert late.last.draft_version == "v2-two" and holds(engine, second) and engine.stats().drafts == {"*": "v2-two"}
        assert late.tokens == known.continuation(engine.codec.encode("hello world"), 5, ends=False)
        assert engine.stats().capture_faults == 0
    assert {e.draft_version for e in sink.of("late")} == {"v2-two"} and {e.draft_version for e in sink.of("old-0")} == {"v1"}


def test_who_waited_for_a_draft_in_place_is_served_under_its_name(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """However late the thread that put it there goes on."""
    with serving(place) as engine:
        second, late = place.build("v2-two", noise=0.3, seed=3), Answer()
        put_draft, put_in_place = engine._server.put_draft, engine._put_in_place

        def while_paused(build: EngineBuild) -> None:
            engine.submit(ask("late", "hello world", max_tokens=5, ignore_eos=True), late)
            put_draft(build)

        def slowly(build: EngineBuild) -> None:
            put_in_place(build)
            until(lambda: bool(late.finish_reason))

        monkeypatch.setattr(engine._server, "put_draft", while_paused)
        monkeypatch.setattr(engine, "_put_in_place", slowly)
        engine.set_drafts({"*": second})
        assert late.last.draft_version == "v2-two"


def test_a_draft_that_is_not_taken_is_told_and_the_old_one_is_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(place) as engine:
        second = place.build("v2-two", noise=0.3, seed=3)
        monkeypatch.setattr(type(model_of(engine)), "load_draft_weights", lambda self, weights: None)
        with pytest.raises(BuildError, match="was not taken, restart this replica"):
            engine.set_drafts({"*": second})
        monkeypatch.undo()
        heard, = answer(engine, ask("a", "hello", max_tokens=5, ignore_eos=True))
        assert heard.last.draft_version == "v1" and len(heard.tokens) == 5, "it serves on, and what it serves is as said"
        engine.set_drafts({"*": second})
        assert holds(engine, second)


def test_requests_that_do_not_end_put_the_swap_off(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "IN_PLACE_PATIENCE_S", 0.0)
    with serving(place) as engine:
        first = model_of(engine).loads
        stream = engine.submit(ask("long", "hello world", max_tokens=400, ignore_eos=True))
        until(lambda: engine.stats().running == 1)
        with pytest.raises(BuildError, match="did not end within"):
            engine.set_drafts({"*": place.build("v2-two", seed=3)})
        assert model_of(engine).loads == first
        stream.cancel()
        heard, = answer(engine, ask("next", "hello", max_tokens=5, ignore_eos=True))
        assert heard.last.draft_version == "v1"


def test_none_and_a_version_that_has_no_way_ask_for_a_new_server(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(place) as engine:
        with pytest.raises(RestartNeeded):
            engine.set_drafts({})
        import tensorrt_llm._ray_utils

        monkeypatch.delattr(tensorrt_llm._ray_utils, "control_action_decorator")
        with pytest.raises(RestartNeeded, match="blue_green"):
            engine.set_drafts({"*": place.build("v2-two", seed=3)})


# --- several GPUs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def split(tmp_path: Path) -> Iterator[Place]:
    with stand_in("1.3"):
        yield write_trtllm_place(tmp_path, "1.3", {"serve": {**IN_PLACE["serve"], "gpus": 2}}, trtllm=RAY)


def test_both_ranks_are_given_the_draft_and_rank_0_alone_captures(split: Place) -> None:
    sink, known = LossySink(), KnownNetwork(split)
    with serving(split, sink) as engine:
        workers, second = engine._server._llm._workers, split.build("v2-two", noise=0.3, seed=3)
        assert [hasattr(worker, "_tide_tap") for worker in workers] == [True, False]
        before = model_of(engine).loads
        engine.set_drafts({"*": second})
        assert model_of(engine).loads == before + 2 and holds(engine, second)
        answers = answer(engine, *REQUESTS)
        until(lambda: all(s.closed for s in sink.requests.values()))
        assert engine.stats().capture_faults == 0
    for request, heard in zip(REQUESTS, answers, strict=True):
        check_capture(sink, request.request_id, [*engine.codec.encode(request.prompt), *heard.tokens], known)
        assert heard.last.draft_version == "v2-two"


@pytest.mark.parametrize("method", ["tide_begin", "tide_take"])
def test_a_worker_that_does_not_answer_ends_capture_and_nothing_else(method: str, split: Place, monkeypatch: pytest.MonkeyPatch,
                                                                     caplog: pytest.LogCaptureFixture) -> None:
    calls, original = [], getattr(TideWorker, method)

    def dies(self: TideWorker, *args: Any) -> Any:
        calls.append(method)
        if len(calls) > (0 if method == "tide_begin" else 4):
            raise ConnectionError("the actor is gone")
        return original(self, *args)

    monkeypatch.setattr(TideWorker, method, dies)
    sink = LossySink()
    with serving(split, sink) as engine:
        answers = answer(engine, *REQUESTS)
        until(lambda: engine.stats().capture_faults == 1)
        after, = answer(engine, ask("after", "hello", max_tokens=6, ignore_eos=True))
        until(lambda: all(s.closed for s in sink.requests.values()) and "after" in sink.requests)
    assert all(heard.finish_reason for heard in answers) and len(after.tokens) == 6
    assert [t for e in sink.of("after") for t in e.emitted] == after.tokens, "read off its stream"
    warnings = [record for record in caplog.records if "not captured from here on" in record.message]
    assert len(warnings) == 1 and "ConnectionError" in warnings[0].message


def test_an_altered_draft_is_refused_before_any_worker_hears_of_it(split: Place) -> None:
    with serving(split) as engine:
        second, before = split.build("v2-two", noise=0.3, seed=3), model_of(engine).loads
        weights = Path(second.path) / "draft" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"!")
        with pytest.raises(BuildError, match="altered"):
            engine.set_drafts({"*": second})
        assert model_of(engine).loads == before
