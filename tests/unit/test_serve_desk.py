"""Desk and answers over a real tiny engine; only the way back to the client is a stand-in."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ask, drain, tiny_engine, tiny_spec
from tide_pipeline.contracts import EngineBuild, StepKind
from tide_pipeline.engine.embedded import EmbeddedEngine
from tide_pipeline.engine.protocol import NullSink, Sink
from tide_pipeline.errors import EngineClosed, InvalidRequest
from tide_pipeline.serve import desk
from tide_pipeline.serve.answer import ErrorKind
from tide_pipeline.serve.desk import Desk
from tide_pipeline.serve.request import Asked
from tide_pipeline.serve.tally import Recent, TallySink


class HeardReply:
    """A client that remembers."""

    def __init__(self) -> None:
        self.heard: list[dict[str, str]] = []
        self.error: tuple[ErrorKind, str] | None = None
        self.is_ended = self.is_gone = False

    def send(self, outputs: dict[str, str], *, is_last: bool) -> None:
        assert not self.is_ended
        self.heard.append(outputs)
        self.is_ended = is_last

    def fail(self, kind: ErrorKind, message: str) -> None:
        assert not self.is_ended
        self.error, self.is_ended = (kind, message), True

    def is_cancelled(self) -> bool:
        return self.is_gone


def asked(request_id: str, *, streaming: bool = False, echo: bool = False, speculation: str = "auto", **sampling: Any) -> Asked:
    return Asked(ask(request_id, "hello world", speculation=speculation, **sampling), streaming, echo, True, True, False)


class Counter:
    """An engine behind a desk, stepped by hand."""

    def __init__(self, target_dir: Path, build: EngineBuild | None = None, places: int = 2, behind: Sink | None = None) -> None:
        self.desk = Desk(places)
        self.tally = TallySink(behind or NullSink(), self.desk.admitted)
        self.engine: EmbeddedEngine = tiny_engine(target_dir, spec=tiny_spec(), drafts=build, sink=self.tally)

    def take(self, what: Asked) -> HeardReply:
        reply = HeardReply()
        self.desk.take(self.engine, what, reply)
        return reply


def test_one_response_unless_streaming(tiny_dir: Path, tiny_build: EngineBuild) -> None:
    counter = Counter(tiny_dir, tiny_build)
    single = counter.take(asked("a", max_tokens=12, ignore_eos=True))
    streamed = counter.take(asked("b", streaming=True, max_tokens=12, ignore_eos=True))
    drain(counter.engine)
    assert len(single.heard) == 1 and len(streamed.heard) > 1
    assert single.heard[0]["text_output"] == streamed.heard[-1]["text_output"]
    assert single.heard[0]["num_output_tokens"] == "12" and single.heard[0]["draft_version"] == "v1"
    so_far = [event["text_output"] for event in streamed.heard]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(so_far))
    assert "num_output_tokens" not in streamed.heard[0]


def test_prompt_is_echoed_only_in_a_single_response(tiny_dir: Path) -> None:
    counter = Counter(tiny_dir)
    single = counter.take(asked("a", echo=True, max_tokens=3))
    streamed = counter.take(asked("b", echo=True, streaming=True, max_tokens=3))
    drain(counter.engine)
    assert single.heard[0]["text_output"] == "hello world" + streamed.heard[-1]["text_output"]


def test_a_client_that_left_frees_its_slot(tiny_dir: Path) -> None:
    counter = Counter(tiny_dir)
    stays, leaves = counter.take(asked("a", streaming=True, max_tokens=40)), counter.take(asked("b", streaming=True, max_tokens=40))
    for _ in range(4):
        counter.engine.step()
    assert counter.engine.stats().running == 2
    leaves.is_gone = True
    assert counter.desk.sweep() == 1
    counter.engine.step()
    assert counter.engine.stats().running == 1 and leaves.error is not None and leaves.error[0] is ErrorKind.CANCELLED
    drain(counter.engine)
    assert stays.is_ended and stays.error is None
    assert counter.desk.sweep() == 0


def test_cancel_by_id(tiny_dir: Path) -> None:
    counter = Counter(tiny_dir)
    reply = counter.take(asked("a", max_tokens=40))
    assert counter.desk.cancel("a") and not counter.desk.cancel("z")
    drain(counter.engine)
    assert reply.error == (ErrorKind.CANCELLED, "the request was cancelled")


def test_take_waits_for_room(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk, "LONGEST_TAKE_S", 60.0)
    counter = Counter(tiny_dir, places=1)
    counter.take(asked("a", max_tokens=4))
    second = threading.Thread(target=counter.take, args=(asked("b", max_tokens=4),))
    second.start()
    second.join(0.2)
    assert second.is_alive() and counter.engine.stats().waiting == 1
    counter.engine.step()                                  # "a" leaves the queue
    second.join(5)
    assert not second.is_alive() and counter.engine.stats().waiting == 1 and counter.desk.parked() == 0


def until(condition: Callable[[], bool]) -> None:
    gives_up = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < gives_up
        time.sleep(0.005)


def test_what_found_no_room_is_parked_and_admitted_in_order(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's thread comes back soon; a refusal is told to the client then."""
    monkeypatch.setattr(desk, "LONGEST_TAKE_S", 0.02)
    counter = Counter(tiny_dir, places=1)
    replies = {name: counter.take(asked(name, max_tokens=0 if name == "c" else 2, ignore_eos=True)) for name in "abcd"}
    assert counter.desk.parked() == 3 and counter.engine.stats().waiting == 1
    with pytest.raises(InvalidRequest, match="in use"):
        counter.take(asked("c"))
    until(lambda: bool(counter.engine.step() or all(reply.is_ended for reply in replies.values())))
    assert replies["c"].error is not None and replies["c"].error[0] is ErrorKind.INVALID_ARG
    assert all(replies[name].heard[-1]["num_output_tokens"] == "2" for name in "abd") and counter.desk.parked() == 0
    counter.take(asked("c", max_tokens=2))                 # its id is free again
    counter.desk.close()


def test_a_parked_request_ends_with_its_client_its_deadline_or_the_desk(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk, "LONGEST_TAKE_S", 0.02)
    counter = Counter(tiny_dir, places=1)
    counter.take(asked("first", max_tokens=2))
    replies = {name: counter.take(asked(name)) for name in ("leaves", "stopped", "waits")}
    late = HeardReply()
    counter.desk.take(counter.engine, replace(asked("late"), began=time.monotonic() - 1e4), late)
    assert counter.desk.parked() == 4
    replies["leaves"].is_gone = True
    assert counter.desk.sweep() == 2 and late.heard[0]["finish_reason"] == "deadline"
    assert counter.desk.cancel("stopped") and not counter.desk.cancel("stopped")
    assert {replies[name].error for name in ("leaves", "stopped")} == {(ErrorKind.CANCELLED, "the request was cancelled")}
    counter.desk.close()
    assert replies["waits"].error is not None and replies["waits"].error[0] is ErrorKind.UNAVAILABLE and counter.desk.parked() == 0


def test_a_refused_request_leaves_its_place(tiny_dir: Path) -> None:
    counter = Counter(tiny_dir, places=1)
    for _ in range(3):
        with pytest.raises(InvalidRequest):
            counter.take(asked("a", max_tokens=0))
    counter.take(asked("a", max_tokens=2))


def test_closing_tells_clients_to_go_elsewhere(tiny_dir: Path) -> None:
    counter = Counter(tiny_dir)
    reply = counter.take(asked("a", max_tokens=4))
    counter.desk.close()
    with pytest.raises(EngineClosed):
        counter.take(asked("b"))
    counter.engine.close()
    assert reply.error is not None and reply.error[0] is ErrorKind.UNAVAILABLE


def test_tally_agrees_with_the_engine(tiny_dir: Path, tiny_build: EngineBuild) -> None:
    counter = Counter(tiny_dir, tiny_build)
    recent = Recent(counter.tally, 10.0, now=0.0)
    counter.take(asked("a", speculation="3", max_tokens=20, ignore_eos=True))
    drain(counter.engine)
    stats, (counts, seconds) = counter.engine.stats(), recent.take(2.0)
    assert seconds == 2.0 and counts["v1"].verify_steps == stats.verify_steps and counts["v1"].accepted == stats.accepted_tokens
    assert counts["v1"].emitted == stats.tokens_out - 1                         # the prefill's token is no step's gain
    assert counts["v1"].acceptance_length == 1 + stats.accepted_tokens / stats.verify_steps
    assert StepKind.PREFILL not in counts


class BadSink(NullSink):
    """Raises in one of its calls, with a prompt in its words."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __getattribute__(self, name: str) -> Any:
        if name == object.__getattribute__(self, "_where"):
            raise RuntimeError("xyzzy-secret")
        return super().__getattribute__(name)


@pytest.mark.parametrize("where", ["on_open", "on_step", "on_close"])
def test_a_sink_that_raises_takes_neither_counts_nor_admissions_with_it(tiny_dir: Path, tiny_build: EngineBuild, where: str,
                                                                        caplog: pytest.LogCaptureFixture) -> None:
    counter = Counter(tiny_dir, tiny_build, places=1, behind=BadSink(where))
    replies = []
    for name in "abc":                                          # with one place, the next can only be taken when this one was admitted
        replies.append(counter.take(asked(name, speculation="3", max_tokens=12, ignore_eos=True)))
        counter.engine.step()
    drain(counter.engine)
    assert all(reply.heard[-1]["num_output_tokens"] == "12" for reply in replies)
    assert counter.tally.errors == 1 and counter.engine.stats().sink_errors == 0
    assert counter.tally.by_version()["v1"].accepted == counter.engine.stats().accepted_tokens > 0
    assert "switched off" in caplog.text and "xyzzy" not in caplog.text
    assert counter.desk.waits.queue.read().count == 3 and counter.desk.waits.finished()["length"] == 3
