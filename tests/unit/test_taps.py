"""The ring of tapped states, its copies off a device, and the order in which a sink hears of them. Copies end when the test says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import (
    RecordingSink,
    ask,
    assert_states_match,
    busy,
    drain,
    generate,
    submit,
    tiny_engine,
)
from tide_pipeline.contracts import EngineBuild, TapHandle
from tide_pipeline.engine.embedded import EmbeddedEngine
from tide_pipeline.engine.outbox import Outbox
from tide_pipeline.engine.tap_copies import BUFFERS, DeviceTapRing, tap_ring
from tide_pipeline.engine.taps import HOST_STEPS, UNREAD_ROWS, UNREAD_STEPS, HostTapRing, StepRing
from tide_pipeline.models.target import Target

CPU, D, ROWS = torch.device("cpu"), 2, 4


@dataclass
class HeldCopy:
    """Reads its source when it ends, as late as a device may."""

    source: Tensor
    to: Tensor
    ended: bool = False

    def query(self) -> bool:
        return self.ended

    def synchronize(self) -> None:
        if not self.ended:
            self.to.copy_(self.source)
            self.ended = True


@dataclass
class HeldCopier:
    """Stands in for the side stream of a GPU."""

    copies: list[HeldCopy] = field(default_factory=list)

    def room(self, rows: int, width: int) -> Tensor:
        return torch.full((rows, width), torch.nan, dtype=torch.bfloat16)

    def start(self, source: Tensor, to: Tensor) -> HeldCopy:
        self.copies.append(HeldCopy(source, to))
        return self.copies[-1]

    def end(self, count: int = 1) -> None:
        """In the order in which they began, as on one stream."""
        for copy in [copy for copy in self.copies if not copy.ended][:count]:
            copy.synchronize()


class Bench:
    """A ring of 3 slots, an outbox, and what was delivered: (step, states)."""

    def __init__(self) -> None:
        self.copier, self.heard = HeldCopier(), list[tuple[int, list[float]]]()
        self.ring = DeviceTapRing(3, ROWS, D, 1, False, CPU, self.copier)
        self.outbox = Outbox(lambda call: call())

    def step(self, number: int, rows: int = 1) -> TapHandle | None:
        self.outbox.poll()
        self.ring.next_slot()
        handle = self.ring.put(torch.full((rows, D), float(number)), None)
        self.outbox.post(lambda: self.hear(number, handle), self.ring.ship())
        return handle

    def hear(self, number: int, handle: TapHandle | None) -> None:
        self.heard.append((number, [] if handle is None else self.ring.rows(handle)[:, 0].tolist()))

    @property
    def told(self) -> list[int]:
        return [number for number, _ in self.heard]


# --- the ring of a device ----------------------------------------------------------------------------------------

def test_rows_are_heard_of_when_their_copy_has_ended_and_in_order() -> None:
    bench = Bench()
    bench.step(1, rows=2)
    bench.step(2)
    assert not bench.heard and len(bench.copier.copies) == BUFFERS
    bench.copier.end()
    assert not bench.heard                                          # nobody looked yet
    bench.outbox.poll()
    assert bench.heard == [(1, [1.0, 1.0])]
    bench.step(3)
    bench.copier.end(2)
    bench.outbox.poll()
    assert bench.heard[1:] == [(2, [2.0]), (3, [3.0])] and not len(bench.outbox)


def test_a_copy_waits_for_a_host_buffer_and_begins_when_one_is_free() -> None:
    bench = Bench()
    for number in (1, 2, 3):
        bench.step(number)
    assert len(bench.copier.copies) == BUFFERS                      # the third has no buffer
    bench.copier.end()
    bench.outbox.poll()
    assert len(bench.copier.copies) == 3 and bench.told == [1]


def test_a_full_ring_drops_the_step_and_counts_its_rows() -> None:
    bench = Bench()
    for number in (1, 2, 3):
        assert bench.step(number) is not None
    assert bench.step(4, rows=3) is None and bench.step(5) is None
    assert bench.ring.dropped_rows == 4 and not bench.heard         # and serving went on
    bench.copier.end(3)
    bench.outbox.poll()
    bench.copier.end(3)
    bench.outbox.poll()
    assert bench.heard == [(1, [1.0]), (2, [2.0]), (3, [3.0]), (4, []), (5, [])]
    assert bench.step(6) is not None and bench.ring.dropped_rows == 4


@settings(max_examples=100)
@given(moves=st.lists(st.one_of(st.integers(1, ROWS).map(lambda rows: ("step", rows)), st.integers(1, 3).map(lambda n: ("end", n)),
                                st.just(("call", 0))), max_size=40))
def test_whatever_the_copies_do_every_step_is_heard_once_in_order_with_its_own_rows(moves: list[tuple[str, int]]) -> None:
    bench, numbers, rows_of, dropped = Bench(), iter(range(1, 100)), dict[int, int](), 0
    for what, n in moves:
        if what == "end":
            bench.copier.end(n)
            continue
        number = next(numbers)
        if what == "call":
            bench.outbox.post(lambda number=number: bench.heard.append((number, [])))
            rows_of[number] = 0
        else:
            rows_of[number] = n if bench.step(number, rows=n) is not None else 0
            dropped += n - rows_of[number]
    bench.outbox.flush()
    assert bench.heard == [(number, [float(number)] * rows) for number, rows in rows_of.items()]
    assert bench.ring.dropped_rows == dropped
    for number in (200, 201, 202):                                  # everything is free again
        assert bench.step(number) is not None


def test_the_ring_of_a_host_is_ready_at_once() -> None:
    ring = tap_ring(2, ROWS, D, 1, False, CPU)
    assert type(ring) is HostTapRing
    ring.next_slot()
    handle = ring.put(torch.ones(1, D), None)
    assert ring.ship() is None and handle is not None and ring.rows(handle).tolist() == [[1.0, 1.0]]


def test_a_host_asks_to_be_read_before_rows_pile_up_or_are_lost() -> None:
    """Rows of many steps are made at once; until `must_read` says so, the oldest handle is still good."""
    ring, handles = HostTapRing(D, 1, False), list[TapHandle]()
    while not ring.must_read:
        ring.next_slot()
        handle = ring.put(torch.full((2, D), float(len(handles))), None)
        assert handle is not None
        handles.append(handle)
    assert len(handles) == UNREAD_STEPS
    assert [ring.rows(handle)[:, 0].tolist() for handle in handles] == [[float(i)] * 2 for i in range(len(handles))]
    assert not ring.must_read, "they have been read"
    ring.next_slot()
    ring.put(torch.zeros(UNREAD_ROWS, D), None)
    assert ring.must_read, "a long prompt"
    ring.clear()
    assert not ring.must_read
    with pytest.raises(KeyError):
        ring.rows(handles[0])


def test_rows_of_a_host_stay_for_a_sink_that_never_clears() -> None:
    ring, first = HostTapRing(D, 1, False), None
    for step in range(HOST_STEPS):
        ring.next_slot()
        handle = ring.put(torch.full((1, D), float(step)), None)
        first = first or handle
    assert first is not None and ring.rows(first).tolist() == [[0.0, 0.0]]
    ring.next_slot()
    with pytest.raises(KeyError):
        ring.rows(first)


@pytest.mark.parametrize("make", [lambda: HostTapRing(D, 1, True), lambda: DeviceTapRing(2, 6, D, 1, True, CPU, HeldCopier())],
                         ids=["host", "device"])
def test_rows_that_a_step_keeps_are_put_together_and_told_apart(make: Callable[[], StepRing]) -> None:
    ring = make()
    taps, final = torch.arange(12.0).view(6, 2), -torch.arange(12.0).view(6, 2)
    for kept in ([range(0, 2), range(3, 4), range(5, 6)], [range(0, 3), range(3, 6)], [range(2, 3)]):
        ring.next_slot()
        handles, outbox, seen = ring.put_each(taps, final, kept), Outbox(lambda call: call()), list[Tensor]()
        outbox.post(lambda handles=handles, seen=seen: seen.extend(ring.rows(handle).clone() for handle in handles), ring.ship())
        outbox.flush()
        for rows, got in zip(kept, seen, strict=True):
            assert torch.equal(got.float(), torch.cat((taps, final), dim=1)[rows.start : rows.stop])


def test_a_ring_that_nobody_reads_keeps_nothing() -> None:
    ring = DeviceTapRing(1, ROWS, D, 1, False, CPU, HeldCopier())
    ring.is_read = False
    for _ in range(3):
        ring.next_slot()
        assert ring.put_each(torch.ones(2, D), None, [range(0, 1), range(1, 2)]) == [None, None] and ring.ship() is None
    assert ring.dropped_rows == 0


# --- in the engine -----------------------------------------------------------------------------------------------

class LossySink(RecordingSink):
    """As the recorder does: a step without states is heard of all the same."""

    def on_step(self, events) -> None:  # type: ignore[no-untyped-def]
        super().on_step([event for event in events if event.taps is not None])


def engine_with_held_copies(folder: Path, build: EngineBuild, sink: RecordingSink) -> tuple[EmbeddedEngine, HeldCopier]:
    engine, copier = tiny_engine(folder, drafts=build, sink=sink, max_batch=3), HeldCopier()
    made = engine.ring
    engine.ring = DeviceTapRing(8, 64, made.hidden_size, made.num_taps, made.with_final, CPU, copier)
    engine._runner.ring = sink.ring = engine.ring
    return engine, copier


REQUESTS = [ask(f"r{i}", "some text " * (1 + i), speculation=how, max_tokens=12 + 3 * i, ignore_eos=True)
            for i, how in enumerate(("auto", "off", "3", "2"))]


def test_states_that_arrive_late_are_the_same_states(tiny_dir: Path, tiny_target: Target, tiny_build: EngineBuild) -> None:
    """Copies end between steps: a sink hears of each in the next one. States equal a plain pass, tokens those without a sink."""
    sink, plain = LossySink(), generate(tiny_engine(tiny_dir, drafts=tiny_build, max_batch=3), *REQUESTS)
    engine, copier = engine_with_held_copies(tiny_dir, tiny_build, sink)
    answers = [submit(engine, request) for request in REQUESTS]
    while busy(engine):
        engine.step()
        copier.end(BUFFERS)
    assert len(engine._outbox) > 0                                  # the newest are still under way
    engine.close()
    assert sink.is_closed and [a.tokens for a in answers] == [a.tokens for a in plain]
    for request, answer in zip(REQUESTS, answers, strict=True):
        seen, tokens = sink.requests[request.request_id], [*engine.codec.encode(request.prompt), *answer.tokens]
        assert seen.closed is not None and seen.row_tokens == tokens[:-1]
        assert_states_match(tiny_target, tokens[:-1], seen.rows)
    assert engine.stats().dropped_tap_rows == 0


def test_copies_that_never_end_cost_rows_and_nothing_else(tiny_dir: Path, tiny_build: EngineBuild) -> None:
    plain = generate(tiny_engine(tiny_dir, drafts=tiny_build, max_batch=3), *REQUESTS)
    sink = LossySink()
    engine, _ = engine_with_held_copies(tiny_dir, tiny_build, sink)
    answers = [submit(engine, request) for request in REQUESTS]
    drain(engine)
    assert [a.tokens for a in answers] == [a.tokens for a in plain]
    assert engine.stats().dropped_tap_rows > 0 and [seen.closed for seen in sink.requests.values()] == [None]
    engine.close()                                                  # waits for what is under way, in order
    kept = sum(len(seen.row_tokens) for seen in sink.requests.values())
    consumed = sum(len(engine.codec.encode(r.prompt)) + len(a.tokens) - 1 for r, a in zip(REQUESTS, answers, strict=True))
    assert kept + engine.stats().dropped_tap_rows == consumed
    assert all(seen.closed is not None for seen in sink.requests.values()) and len(sink.requests) == len(REQUESTS)


def test_an_idle_engine_hands_over_what_arrives_last(tiny_dir: Path, tiny_build: EngineBuild) -> None:
    sink = LossySink()
    engine, copier = engine_with_held_copies(tiny_dir, tiny_build, sink)
    engine.start()
    try:
        assert sum(len(chunk.token_ids) for chunk in engine.submit(REQUESTS[0])) == 12
        while not (closed := sink.requests.get("r0")) or closed.closed is None:
            copier.end()
        assert not engine._outbox and len(closed.row_tokens) == len(engine.codec.encode(REQUESTS[0].prompt)) + 11 - engine.ring.dropped_rows
    finally:
        engine.close()
