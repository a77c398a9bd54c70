"""The engine on TensorRT-LLM, every version line, with the stand-in in this process: answers, captured states, and how it fails open."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import Answer, RecordingSink, ask
from tests.serving import Place, until
from tests.trtllm import LENGTH, KnownNetwork, write_trtllm_place
from tests.trtllm_stand_in import stand_in
from tide_pipeline.contracts import FinishReason, StepEvent, StepKind
from tide_pipeline.engine.opening import open_engine
from tide_pipeline.engine.protocol import Sink
from tide_pipeline.engine.trtllm.engine import TrtllmEngine
from tide_pipeline.engine.trtllm.facts import LINES
from tide_pipeline.errors import BuildError, InvalidRequest, QueueFull, RestartNeeded, SettingsError

RAY = 'orchestrator = "ray"'


class LossySink(RecordingSink):
    """As the recorder does: a step without states is heard of all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[StepEvent] = []

    def on_step(self, events: Sequence[StepEvent]) -> None:
        self.events += events
        assert all(e.request_id in self.requests for e in events), "told of a step before the request was opened"
        super().on_step([event for event in events if event.taps is not None])

    def of(self, request_id: str) -> list[StepEvent]:
        return [e for e in self.events if e.request_id == request_id]


@pytest.fixture(scope="module", params=LINES)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One for each version; tensorrt_llm is that version's stand-in."""
    with stand_in(request.param):
        yield write_trtllm_place(tmp_path_factory.mktemp("trtllm"), request.param, {"serve": {"max_batch": 4, "queue_size": 6}})


@contextlib.contextmanager
def serving(place: Place, sink: Sink | None = None, *, draft: bool = True) -> Iterator[TrtllmEngine]:
    engine = open_engine(place.config, place.spec, sink)
    assert isinstance(engine, TrtllmEngine)
    if draft:
        engine.set_drafts({"*": build_of(place)})
    try:
        engine.start()
        yield engine
    finally:
        engine.close()


def build_of(place: Place, version: str = "v1") -> Any:
    found = [b for b in place.config.state.builds.glob("tiny/*/build.json")]
    return place.build(version) if version != "v1" or not found else _load(place)


def _load(place: Place) -> Any:
    from tide_pipeline.deployment.builds import list_builds

    return next(b for b in list_builds(place.config.state.builds, "tiny") if b.draft_version == "v1")


def answer(engine: TrtllmEngine, *requests: Any) -> list[Answer]:
    answers = [Answer() for _ in requests]
    for request, heard in zip(requests, answers, strict=True):
        engine.submit(request, heard)
    until(lambda: all(a.finish_reason for a in answers), 60)
    return answers


def check_capture(sink: LossySink, request_id: str, text: Sequence[int], known: KnownNetwork) -> int:
    """Steps tile the text from where its prompt was computed; states are the target's, bit for bit. How many rows have none: dropped."""
    told, seen = sink.of(request_id), sink.requests[request_id]
    assert [t for e in told for t in e.row_tokens] == list(text[told[0].start_pos : -1]) and seen.closed is not None
    for event, states in zip(seen.events, seen.states, strict=True):
        stop = event.start_pos + len(event.row_tokens)
        assert list(event.row_tokens) == list(text[event.start_pos : stop])
        assert torch.equal(states, known.states(text[:stop], event.start_pos))
    return sum(len(e.row_tokens) for e in told if e.taps is None)


PROMPTS = [f"some text of a prompt, number {i}, that goes on {'and on ' * i}" for i in range(6)]
REQUESTS = [ask(f"r{i}", prompt, max_tokens=5 + 7 * i, ignore_eos=i % 2 == 0) for i, prompt in enumerate(PROMPTS)]


def test_answers_are_the_targets_and_captured_states_are_its_states(place: Place) -> None:
    """Six requests over four places, bit for bit: every token, every row, in order and without a gap."""
    sink, known = LossySink(), KnownNetwork(place)
    with serving(place, sink) as engine:
        answers = answer(engine, *REQUESTS)
        stats = engine.stats()
    assert stats.capture_faults == 0 and sink.is_closed and stats.tokens_out == sum(len(a.tokens) for a in answers)
    lost = 0
    for request, heard in zip(REQUESTS, answers, strict=True):
        prompt = engine.codec.encode(request.prompt)
        assert heard.tokens == known.continuation(prompt, request.sampling.max_tokens, ends=not request.sampling.ignore_eos)
        assert heard.text == engine.codec.decode(heard.tokens) and heard.last.draft_version == "v1"
        seen = sink.requests[request.request_id]
        assert seen.closed is not None and seen.closed.num_output_tokens == len(heard.tokens)
        lost += check_capture(sink, request.request_id, [*prompt, *heard.tokens], known)
        steps = [e for e in sink.of(request.request_id) if e.kind is not StepKind.PREFILL]
        assert heard.last.target_steps == len(steps)
        assert 0 <= sum(e.accepted for e in steps) - heard.last.accepted_tokens <= 1       # a draft token may be the last of all
        assert all(e.draft_length == LENGTH and e.drafted[: e.accepted] == e.emitted[: e.accepted] for e in steps)
    assert lost <= stats.dropped_tap_rows and (lost == 0) == (stats.dropped_tap_rows == 0)


def test_a_shared_beginning_comes_from_the_cache_and_is_not_captured_twice(place: Place) -> None:
    sink, known = LossySink(), KnownNetwork(place)
    with serving(place, sink) as engine:
        for i in range(2):
            answer(engine, ask(f"twin-{i}", "a long beginning that two requests share", max_tokens=6, ignore_eos=True))
    first, second = sink.requests["twin-0"], sink.requests["twin-1"]
    assert first.events[0].start_pos == 0 and second.events[0].start_pos > 0
    assert torch.equal(second.rows, first.rows[second.events[0].start_pos:])
    assert torch.equal(first.rows, known.states(first.row_tokens))


def test_without_a_draft_it_serves_plainly_and_tells_of_every_token(place: Place) -> None:
    sink, known = LossySink(), KnownNetwork(place)
    with serving(place, sink, draft=False) as engine:
        heard, = answer(engine, ask("plain", "hello world", max_tokens=9, ignore_eos=True, speculation="off"))
        stats = engine.stats()
    assert heard.tokens == known.continuation(engine.codec.encode("hello world"), 9, ends=False)
    assert (stats.capture_faults, stats.verify_steps, heard.last.draft_version) == (0, 0, "")
    assert [e.kind for e in sink.of("plain")] == [StepKind.PREFILL] + [StepKind.DECODE] * 8
    assert [t for e in sink.of("plain") for t in e.emitted] == heard.tokens and all(e.taps is None for e in sink.events)


def test_stop_strings_end_on_the_same_character_as_in_the_embedded_engine(place: Place) -> None:
    with serving(place) as engine:
        whole, = answer(engine, ask("whole", "hello world", max_tokens=30, ignore_eos=True))
        stop = whole.text[9:11]
        cut, = answer(engine, ask("cut", "hello world", max_tokens=30, ignore_eos=True, stop=(stop,)))
        until(lambda: engine.stats().running == 0)
    assert cut.finish_reason is FinishReason.STOP and cut.text == whole.text[: whole.text.index(stop)]


def test_cancelled_late_and_too_many(place: Place) -> None:
    with serving(place) as engine:
        heard, streams = [], []
        with pytest.raises(QueueFull):                     # the first may have ended by then
            for i in itertools.count():
                heard.append(Answer())
                streams.append(engine.submit(ask(f"c{i}", "hello", max_tokens=400, ignore_eos=True), heard[-1]))
        with pytest.raises(InvalidRequest, match="in use"):
            engine.submit(ask(f"c{len(streams) - 1}", "hello"))
        for stream in streams:
            stream.cancel()
        until(lambda: all(a.finish_reason for a in heard[:len(streams)]))
        assert {a.finish_reason for a in heard[:len(streams)]} - {FinishReason.LENGTH} == {FinishReason.CANCELLED}
        assert heard[len(streams) - 1].finish_reason is FinishReason.CANCELLED
        heard_late = Answer()
        until(lambda: engine.stats().waiting == 0)
        engine.submit(ask("late", "hello", max_tokens=480, ignore_eos=True, deadline_s=0.05), heard_late)
        until(lambda: heard_late.finish_reason is not None)
        assert heard_late.finish_reason is FinishReason.DEADLINE and len(heard_late.tokens) < 480


@pytest.mark.parametrize(("speculation", "says"), [("off", "no switch per request"), ("1", "drafts 3 tokens for every one")])
def test_what_can_not_be_honoured_for_one_request_is_refused(place: Place, speculation: str, says: str) -> None:
    with serving(place) as engine:
        with pytest.raises(InvalidRequest, match=says):
            engine.submit(ask("a", "hello", speculation=speculation))
        heard, = answer(engine, ask("b", "hello", speculation=str(LENGTH), max_tokens=4))
        assert heard.finish_reason is not FinishReason.ERROR


def test_closing_tells_who_is_in_flight(place: Place) -> None:
    heard = [Answer(), Answer()]
    with serving(place, LossySink()) as engine:
        for i, a in enumerate(heard):
            engine.submit(ask(f"x{i}", "hello", max_tokens=400, ignore_eos=True), a)
    assert [a.finish_reason for a in heard] == [FinishReason.CANCELLED] * 2


# --- drafts ------------------------------------------------------------------------------------------------------

def test_another_draft_needs_another_server_and_the_same_one_does_not(place: Place) -> None:
    with serving(place) as engine:
        engine.set_drafts({"*": build_of(place), "chat": build_of(place)})
        assert engine.stats().drafts == {"*": "v1", "chat": "v1"}
        other = place.build(f"v2-{time.time_ns()}", seed=int(time.time_ns() % 10_000) + 1)
        with pytest.raises(RestartNeeded, match="new server"):
            engine.set_drafts({"*": other})
        with pytest.raises(BuildError, match="one draft per replica"):
            engine.set_drafts({"*": build_of(place), "chat": other})
        assert engine.stats().drafts["*"] == "v1"


def test_a_damaged_draft_is_refused_before_a_server_is_built(place: Place) -> None:
    engine = open_engine(place.config, place.spec)
    try:
        build = place.build(f"v3-{time.time_ns()}", seed=int(time.time_ns() % 10_000) + 20_000)
        file = Path(build.path) / "draft" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
        with pytest.raises(BuildError, match="altered"):
            engine.set_drafts({"*": build})
        assert engine.stats().drafts == {}
    finally:
        engine.close()


# --- capture fails open ------------------------------------------------------------------------------------------

def _forget_lens(outputs: dict[str, Any]) -> None:
    del outputs["new_tokens_lens"]


def _say_too_much(outputs: dict[str, Any]) -> None:
    outputs["new_tokens_lens"] = outputs["new_tokens_lens"] + 9


@pytest.mark.parametrize("harm", [_forget_lens, _say_too_much])
def test_a_pass_that_is_not_as_known_ends_capture_and_nothing_else(place: Place, harm: Callable[[dict[str, Any]], None],
                                                                   monkeypatch: pytest.MonkeyPatch,
                                                                   caplog: pytest.LogCaptureFixture) -> None:
    """What comes back is changed for the wrapper alone: the server reads its own copy."""
    from tide_pipeline.engine.trtllm.capture import PassTap

    original = PassTap._on_return

    def harmed(self: PassTap, batch: Any, outputs: dict[str, Any], began: float) -> None:
        changed = dict(outputs)
        harm(changed)
        original(self, batch, changed, began)

    monkeypatch.setattr(PassTap, "_on_return", harmed)
    sink, known = LossySink(), KnownNetwork(place)
    with serving(place, sink) as engine:
        answers = answer(engine, *REQUESTS)
        until(lambda: engine.stats().capture_faults == 1)
    for request, heard in zip(REQUESTS, answers, strict=True):
        prompt = engine.codec.encode(request.prompt)
        assert heard.tokens == known.continuation(prompt, request.sampling.max_tokens, ends=not request.sampling.ignore_eos)
        assert sink.requests[request.request_id].closed is not None
    assert all(e.taps is None for e in sink.events) and sum("serving goes on without" in r.message for r in caplog.records) == 1
    assert any(e.kind is StepKind.VERIFY and e.accepted for e in sink.events), "acceptance is still told, from the streams"


@pytest.mark.parametrize(("module", "name", "gone"), [
    ("tensorrt_llm._torch.speculative.eagle3", "Eagle3OneModelSpecMetadata", None),
    ("tensorrt_llm._torch.pyexecutor.model_engine", "PyTorchModelEngine", "forward")])
def test_a_version_without_the_private_parts_serves_without_capture(place: Place, module: str, name: str, gone: str | None,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    import tide_pipeline.engine.trtllm.installed as installed

    original = installed.symbol

    def symbol(fact: Any) -> Any:
        if fact.module == module and fact.name.startswith(name) and (gone is None or fact.name.endswith(gone)):
            raise AttributeError(f"no {fact.name}")
        return original(fact)

    monkeypatch.setattr(installed, "symbol", symbol)
    sink = LossySink()
    with serving(place, sink) as engine:
        heard, = answer(engine, ask("a", "hello world", max_tokens=12, ignore_eos=True))
        assert engine.stats().capture_faults == 1
    assert len(heard.tokens) == 12 and heard.last.accepted_tokens > 0
    assert sum(len(e.emitted) for e in sink.of("a")) == 12 and all(e.taps is None for e in sink.events)


def test_a_sink_that_fails_takes_nothing_along(place: Place) -> None:
    class Broken(LossySink):
        def on_step(self, events: Sequence[StepEvent]) -> None:
            raise OSError("no room")

    with serving(place, Broken()) as engine:
        heard, = answer(engine, ask("a", "hello world", max_tokens=12, ignore_eos=True))
        until(lambda: engine.stats().sink_errors == 1)
    assert len(heard.tokens) == 12


def test_closing_leaves_nvidias_classes_as_they_were(place: Place) -> None:
    from tensorrt_llm._torch.pyexecutor.model_engine import PyTorchModelEngine
    from tensorrt_llm._torch.speculative.eagle3 import Eagle3OneModelSpecMetadata

    before = PyTorchModelEngine.forward, Eagle3OneModelSpecMetadata.prepare
    with serving(place, LossySink()):
        assert PyTorchModelEngine.forward is not before[0]
    assert (PyTorchModelEngine.forward, Eagle3OneModelSpecMetadata.prepare) == before


def test_what_clients_need_is_fatal(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorrt_llm

    monkeypatch.delattr(tensorrt_llm.LLM, "generate_async")
    engine = open_engine(place.config, place.spec)
    with pytest.raises(SettingsError, match=r"LLM\.generate_async"):
        engine.start()
    engine.close()


# --- several GPUs: the same through Ray's worker extension --------------------------------------------------------

def test_states_come_from_rank_0_through_rays_workers(place: Place, tmp_path: Path) -> None:
    line = place.config.serve.trtllm
    split = write_trtllm_place(tmp_path, line, {"serve": {"max_batch": 4, "gpus": 2}}, trtllm=RAY)
    sink, known = LossySink(), KnownNetwork(split)
    with serving(split, sink) as engine:
        answers = answer(engine, *REQUESTS)
        until(lambda: all(s.closed for s in sink.requests.values()))
    for request, heard in zip(REQUESTS, answers, strict=True):
        check_capture(sink, request.request_id, [*engine.codec.encode(request.prompt), *heard.tokens], known)
    assert sum(len(s.row_tokens) for s in sink.requests.values()) > 0


def test_split_over_gpus_without_ray_there_are_no_states(place: Place, tmp_path: Path) -> None:
    split = write_trtllm_place(tmp_path, place.config.serve.trtllm, {"serve": {"max_batch": 4, "gpus": 2}})
    with serving(split, LossySink()) as engine:
        heard, = answer(engine, ask("a", "hello", max_tokens=5, ignore_eos=True))
        assert len(heard.tokens) == 5 and engine.stats().capture_faults == 1
