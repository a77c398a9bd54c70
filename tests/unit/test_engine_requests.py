"""Requests at the engine's border: refused with a clear message, ended in time, and never at the cost of others."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load, save_file

from tests.helpers import (
    Answer,
    RecordingSink,
    ask,
    busy,
    drain,
    generate,
    submit,
    tiny_engine,
    tiny_spec,
    write_tiny_build,
    write_tiny_target,
)
from tide_pipeline.config import SpeculationSettings
from tide_pipeline.contracts import EngineBuild, FinishReason, RequestOpened, StepEvent, TokenChunk
from tide_pipeline.engine.embedded import EmbeddedEngine
from tide_pipeline.errors import BuildError, CheckpointError, EngineClosed, EngineMismatch, InvalidRequest, PromptTooLong, QueueFull
from tide_pipeline.models.target import Target


@pytest.fixture
def engine(tiny_dir: Path, tiny_build: EngineBuild) -> EmbeddedEngine:
    return tiny_engine(tiny_dir, drafts=tiny_build)


# --- refused before they queue -------------------------------------------------------------------------------------

@pytest.mark.parametrize(("wrong", "message"), [
    ({"prompt": ""}, "text_input is empty"),
    ({"prompt": "half \udc80"}, "not valid UTF-8"),
    ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
    ({"max_tokens": -5}, "max_tokens must be at least 1"),
    ({"temperature": -0.1}, "temperature must be between 0"),
    ({"temperature": 1e9}, "temperature must be between 0"),
    ({"temperature": float("nan")}, "temperature must be between 0"),
    ({"temperature": float("inf")}, "temperature must be between 0"),
    ({"top_p": 0.0}, "top_p must be above 0"),
    ({"top_p": 1.1}, "top_p must be above 0"),
    ({"top_p": float("nan")}, "top_p must be above 0"),
    ({"top_k": -1}, "top_k must be 0"),
    ({"speculation": "sometimes"}, "speculation must be auto, off or a draft length of 0 to 4"),
    ({"speculation": "5"}, "speculation must be"),
    ({"speculation": "-1"}, "speculation must be"),
    ({"speculation": "9" * 5_000}, "speculation must be"),
    ({"request_id": ""}, "request_id is empty"),
    ({"request_id": "x" * 129}, "request_id must be 1 to 128"),
    ({"workload": "a\nb"}, "workload must be 1 to 128 printable"),
    ({"tenant": ""}, "tenant must be 1 to 128 printable"),
    ({"deadline_s": 0.0}, "deadline must be above 0"),
    ({"deadline_s": float("nan")}, "deadline must be above 0"),
])
def test_a_request_that_cant_be_served_is_refused(engine: EmbeddedEngine, wrong: dict, message: str) -> None:
    fields = {"request_id": "r", "prompt": "fine", **wrong}
    with pytest.raises(InvalidRequest, match=message):
        engine.submit(ask(**fields))
    assert not busy(engine)


def test_prompt_and_answer_must_fit_the_context(engine: EmbeddedEngine) -> None:
    with pytest.raises(PromptTooLong, match="prompt of 80 tokens and max_tokens 17 exceed this engine's context of 96"):
        engine.submit(ask("r", "a" * 80, max_tokens=17))
    answer, = generate(engine, ask("r", "a" * 80, max_tokens=16, ignore_eos=True))
    assert (answer.finish_reason, len(answer.tokens)) == (FinishReason.LENGTH, 16)


def test_a_request_id_is_free_again_once_its_request_ended(engine: EmbeddedEngine) -> None:
    answer = submit(engine, ask("same", "one", max_tokens=2))
    with pytest.raises(InvalidRequest, match="'same' is in use"):
        engine.submit(ask("same", "two"))
    drain(engine)
    assert len(answer.tokens) == 2 and generate(engine, ask("same", "two", max_tokens=3))[0].finish_reason is not None


def test_a_full_queue_refuses_and_serves_on(tiny_dir: Path) -> None:
    engine = tiny_engine(tiny_dir, queue_size=2)
    answers = [submit(engine, ask(str(i), "x", max_tokens=4)) for i in range(2)]
    with pytest.raises(QueueFull, match="2 requests are waiting already"):
        engine.submit(ask("2", "x"))
    engine.step()
    answers.append(submit(engine, ask("2", "x", max_tokens=4)))               # the refused id was not kept
    drain(engine)
    assert [len(a.tokens) for a in answers] == [4, 4, 4]


# --- ended early -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("steps", [0, 1, 5])
def test_cancelling_frees_the_slot_at_the_next_step(tiny_dir: Path, tiny_build: EngineBuild, steps: int) -> None:
    engine = tiny_engine(tiny_dir, drafts=tiny_build, max_batch=1)
    heard = Answer()
    stream = engine.submit(ask("gone", "a" * 40, max_tokens=50, ignore_eos=True, speculation="2"), heard)
    waiting = submit(engine, ask("next", "b", max_tokens=3))
    for _ in range(steps):                                                    # waiting, prefilling (chunks of 16), running
        engine.step()
    stream.cancel()
    engine.step()
    assert heard.finish_reason is FinishReason.CANCELLED
    drain(engine)
    stream.cancel()                                                           # too late: nothing happens
    assert len(waiting.tokens) == 3 and engine.stats().requests_finished == 2


def test_a_deadline_ends_waiting_and_running_requests(engine: EmbeddedEngine) -> None:
    late = submit(engine, ask("late", "a", max_tokens=60, ignore_eos=True, deadline_s=0.2))
    patient = submit(engine, ask("patient", "b", max_tokens=5))
    for _ in range(3):
        engine.step()
    time.sleep(0.25)
    never = submit(engine, ask("never", "c", deadline_s=1e-9))
    drain(engine)
    assert late.finish_reason is FinishReason.DEADLINE and 0 < len(late.tokens) < 60
    assert never.finish_reason is FinishReason.DEADLINE and never.tokens == []
    assert len(patient.tokens) == 5


def test_text_that_was_held_back_is_told_at_the_deadline(engine: EmbeddedEngine) -> None:
    plain, = generate(engine, ask("plain", "ab", max_tokens=6, ignore_eos=True, speculation="off"))
    text = plain.text
    heard = submit(engine, ask("r", "ab", max_tokens=6, ignore_eos=True, speculation="off", stop=(text + "\x7f never",), deadline_s=0.2))
    for _ in range(3):
        engine.step()
    assert heard.text == ""                                                   # all of it may begin the stop string
    time.sleep(0.25)
    drain(engine)
    assert heard.text and text.startswith(heard.text) and heard.text == engine.codec.decode(heard.tokens)


# --- stop strings ----------------------------------------------------------------------------------------------------

def test_a_stop_string_across_token_borders_ends_plain_and_speculative_answers_alike(engine: EmbeddedEngine) -> None:
    plain, = generate(engine, ask("plain", "stop here", max_tokens=30, ignore_eos=True, speculation="off"))
    stop = plain.text[8:11]                                                   # three characters, so at least two tokens
    for speculation in ("off", "1", "4"):
        answer, = generate(engine, ask(speculation, "stop here", max_tokens=30, ignore_eos=True, speculation=speculation,
                                       stop=(stop, "never there")))
        assert answer.finish_reason is FinishReason.STOP
        assert answer.text == plain.text[: plain.text.find(stop)]
        assert answer.tokens == plain.tokens[: len(answer.tokens)] and engine.codec.decode(answer.tokens).endswith(stop)


def test_end_of_text_stops_unless_ignored(tmp_path: Path) -> None:
    folder = write_tiny_target(tmp_path / "target", vocab=6)                  # end of text comes up soon
    engine = tiny_engine(folder, spec=tiny_spec())
    prompts = [a + b for a in "abcde" for b in "abcde"]
    stopped = [a for a in generate(engine, *[ask(p, p, max_tokens=40) for p in prompts]) if a.finish_reason is FinishReason.STOP]
    assert stopped and all(a.tokens.index(0) == len(a.tokens) - 1 for a in stopped)
    on = generate(engine, *[ask(p, p, max_tokens=40, ignore_eos=True) for p in prompts])
    assert all(len(a.tokens) == 40 for a in on)


# --- others misbehave ------------------------------------------------------------------------------------------------

class _BadSink(RecordingSink):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def on_open(self, opened: RequestOpened) -> None:
        super().on_open(opened)
        if self.where == "on_open":
            raise RuntimeError("no room")

    def on_step(self, events: Sequence[StepEvent]) -> None:
        super().on_step(events)
        if self.where == "on_step":
            raise RuntimeError("no room")

    def close(self) -> None:
        if self.where == "close":
            raise RuntimeError("no room")


@pytest.mark.parametrize("where", ["on_open", "on_step", "close"])
def test_a_sink_that_raises_is_switched_off_and_serving_goes_on(tiny_dir: Path, tiny_build: EngineBuild, where: str,
                                                                caplog: pytest.LogCaptureFixture) -> None:
    sink = _BadSink(where)
    engine = tiny_engine(tiny_dir, drafts=tiny_build, sink=sink)
    with caplog.at_level(logging.ERROR):
        answers = generate(engine, ask("a", "x", max_tokens=5), ask("b", "y", max_tokens=5))
        engine.close()
    assert [len(a.tokens) for a in answers] == [5, 5]
    assert engine.stats().sink_errors == 1 and "switched off" in caplog.text
    assert len(sink.requests) == (2 if where == "close" else 1)


def test_a_client_whose_callback_raises_loses_only_its_own_request(engine: EmbeddedEngine, caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def broken(chunk: TokenChunk) -> None:
        calls.append(chunk)
        raise ConnectionError("client went away")

    with caplog.at_level(logging.ERROR):
        engine.submit(ask("broken", "a", max_tokens=50, ignore_eos=True), broken)
        fine = submit(engine, ask("fine", "b", max_tokens=12, ignore_eos=True))
        drain(engine)
    assert len(fine.tokens) == 12 and calls[-1].finish_reason is FinishReason.CANCELLED and len(calls) < 4
    assert "callback failed" in caplog.text


def test_a_step_that_fails_ends_its_requests_with_the_error_and_the_next_are_served(engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch,
                                                                                    caplog: pytest.LogCaptureFixture) -> None:
    victims = [submit(engine, ask(str(i), "a" * (i + 1), max_tokens=40, ignore_eos=True, speculation="2")) for i in range(3)]
    for _ in range(4):
        engine.step()
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(engine.target, "logits", lambda final_ND: 1 / 0)
        engine.step()
    assert [v.finish_reason for v in victims] == [FinishReason.ERROR] * 3
    assert "ZeroDivisionError" in victims[0].last.error and engine.stats().requests_failed == 3
    answer, = generate(engine, ask("after", "a", max_tokens=4, ignore_eos=True, speculation="2"))
    assert len(answer.tokens) == 4


# --- drafts ----------------------------------------------------------------------------------------------------------

def test_a_draft_that_does_not_fit_is_refused_and_the_running_one_stays(tmp_path: Path, engine: EmbeddedEngine,
                                                                         tiny_target: Target) -> None:
    other = Target(write_tiny_target(tmp_path / "other", seed=5), tiny_spec())
    foreign = write_tiny_build(tmp_path / "foreign", other, version="foreign")
    sick = write_tiny_build(tmp_path / "sick", tiny_target, noise=0.3, version="sick")
    file = Path(sick.path) / "draft" / "model.safetensors"
    weights = load(file.read_bytes())
    weights["fc.weight"][0, 0] = float("nan")
    save_file(weights, file)
    missing = dataclasses.replace(sick, path=str(tmp_path / "nowhere"), build_id="other")
    with pytest.raises(EngineMismatch, match="trained on engine"):
        engine.set_drafts({"*": foreign})
    with pytest.raises(BuildError, match="it was altered"):
        engine.set_drafts({"*": sick})
    with pytest.raises(CheckpointError, match=r"fc\.weight holds NaN"):
        engine.set_drafts({"a": dataclasses.replace(sick, draft_digest="")})
    with pytest.raises(CheckpointError, match="missing"):
        engine.set_drafts({"a": missing, "*": missing})
    assert engine.stats().drafts == {"*": "v1"}
    answer, = generate(engine, ask("r", "abc", speculation="3", max_tokens=8, ignore_eos=True))
    assert answer.last.draft_version == "v1" and answer.last.drafted_tokens > 0


def test_without_a_draft_it_serves_plainly_and_learns_to_speculate_when_one_comes(tiny_dir: Path, tiny_build: EngineBuild) -> None:
    engine = tiny_engine(tiny_dir)
    engine.profile()                                                          # nothing to measure yet
    plain, = generate(engine, ask("r", "abc", speculation="3", max_tokens=8))
    assert plain.last.drafted_tokens == 0 and plain.last.draft_version == ""
    engine.set_drafts({"*": tiny_build})
    answer, = generate(engine, ask("s", "abc", max_tokens=40, ignore_eos=True))
    assert answer.last.drafted_tokens > 0 and answer.last.draft_version == "v1"
    engine.set_drafts({})
    assert generate(engine, ask("t", "abc", max_tokens=4))[0].last.draft_version == ""


def test_a_fixed_length_may_pass_the_controllers_own_limit(tiny_dir: Path, tiny_build: EngineBuild) -> None:
    engine = tiny_engine(tiny_dir, drafts=tiny_build, speculation=SpeculationSettings(max_draft_length=1))
    answer, = generate(engine, ask("r", "abc", speculation="4", max_tokens=20, ignore_eos=True))
    assert len(answer.tokens) == 20, answer.last.error


def test_profile_measures_every_depth_and_width(engine: EmbeddedEngine) -> None:
    engine.profile()
    longest = engine.positions - 4 - 3
    assert longest > 64 and set(engine.stats().step_ms) == {
        name for b in (1, 2, 4) for c in (64, longest)
        for name in [f"m{b}k{k}c{c}" for k in range(1, 5)] + [f"b{b}n{b * w}c{c}" for w in range(1, 6)]}


# --- the thread ------------------------------------------------------------------------------------------------------

def test_close_tells_everybody_cancelled_and_closes_the_sink(tiny_dir: Path, tiny_build: EngineBuild) -> None:
    sink = RecordingSink()
    engine = tiny_engine(tiny_dir, drafts=tiny_build, sink=sink, max_batch=1)
    answers = [submit(engine, ask(str(i), "a" * 20, max_tokens=50, ignore_eos=True)) for i in range(3)]
    for _ in range(4):
        engine.step()
    engine.close()
    assert [a.finish_reason for a in answers] == [FinishReason.CANCELLED] * 3
    assert sink.is_closed and [s.closed.finish_reason for s in sink.requests.values() if s.closed] == [FinishReason.CANCELLED]
    with pytest.raises(EngineClosed, match="shutting down"):
        engine.submit(ask("late", "a"))


def test_a_started_engine_serves_threads_swaps_and_closes(tiny_dir: Path, tiny_build: EngineBuild, tiny_target: Target,
                                                           tmp_path: Path) -> None:
    """The one test here with the engine's own thread: clients submit, iterate and cancel from theirs while drafts change."""
    engine = tiny_engine(tiny_dir, drafts=tiny_build)
    other = write_tiny_build(tmp_path, tiny_target, noise=0.5, version="v2")
    engine.start()
    lengths: dict[int, int] = {}
    refused: list[TokenChunk] = []

    def client(i: int) -> None:
        stream = engine.submit(ask(str(i), "abc" * (i + 1), max_tokens=20, ignore_eos=True, speculation=("auto", "3", "off")[i % 3]))
        if i == 4:
            stream.cancel()
        chunks = list(stream)
        lengths[i] = sum(len(c.token_ids) for c in chunks)
        refused.extend(c for c in chunks if c.finish_reason is FinishReason.ERROR)

    clients = [threading.Thread(target=client, args=(i,)) for i in range(6)]
    for thread in clients:
        thread.start()
    for build in (other, tiny_build) * 3:
        engine.set_drafts({"*": build})
    for thread in clients:
        thread.join(30)
    assert not refused and [lengths[i] for i in (0, 1, 2, 3, 5)] == [20] * 5
    engine.close()
    assert not busy(engine)
