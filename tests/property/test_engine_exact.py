"""Whatever is asked, joins, leaves and changes: greedy output is plain decoding's, and the sink sees each position once.

Random schedules drive `engine.step()` by hand. Set HYPOTHESIS_PROFILE=explore for many more of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import (
    Answer,
    RecordingSink,
    ask,
    assert_states_match,
    busy,
    count_ties,
    drain,
    generate,
    random_draft,
    submit,
    tiny_engine,
    tiny_spec,
    write_tiny_build,
    write_tiny_target,
)
from tide_pipeline.contracts import EngineBuild, FinishReason, GenerationRequest, StepKind
from tide_pipeline.engine.control import Plan, Slot, SpeculationController
from tide_pipeline.engine.embedded import EmbeddedEngine
from tide_pipeline.engine.stopping import Worth
from tide_pipeline.engine_spec import EngineSpec
from tide_pipeline.models.target import Target

LETTERS = "abcdefgh"                     # of prompts
ALL_LETTERS = "abcdefghijklmnopqrstuvwxyz"
CONTEXT = 72
MAX_DEPTH = 4


@dataclass
class World:
    folder: Path
    target: Target
    builds: list[EngineBuild]              # good, reduced vocabulary, useless


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    folder = write_tiny_target(root / "target", vocab=27, layers=3, max_positions=80)
    target = Target(folder, tiny_spec(max_context=CONTEXT, max_draft_length=MAX_DEPTH))
    builds = [write_tiny_build(root / "good", target, version="good"),
              write_tiny_build(root / "reduced", target, version="reduced", vocabulary=torch.arange(0, 27, 2)),
              write_tiny_build(root / "useless", target, random_draft(target), version="useless")]
    return World(folder, target, builds)


# --- what may happen ----------------------------------------------------------------------------------------------

def requests(number: int) -> st.SearchStrategy[GenerationRequest]:
    return st.builds(
        lambda prompt, speculation, workload, max_tokens, heat, stop, eos: ask(
            f"r{number}", prompt, speculation=speculation, workload=workload, max_tokens=max_tokens, temperature=heat, seed=number,
            stop=stop, ignore_eos=eos),
        prompt=st.text(alphabet=LETTERS, min_size=1, max_size=40), speculation=st.sampled_from(["auto", "auto", "off", "0", "1", "2", "4"]),
        workload=st.sampled_from(["a", "b", "else"]), max_tokens=st.integers(1, 32), heat=st.sampled_from([0.0, 0.0, 0.0, 1.0]),
        stop=st.lists(st.text(alphabet=ALL_LETTERS, min_size=1, max_size=2), max_size=2).map(tuple), eos=st.booleans())


drafts = st.one_of(st.just({}), st.dictionaries(st.sampled_from(["*", "a", "b"]), st.integers(0, 2), min_size=1))
actions = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 6)), st.tuples(st.just("ask"), st.just(0)), st.tuples(st.just("ask"), st.just(0)),
    st.tuples(st.just("cancel"), st.integers(0, 9)), st.tuples(st.just("swap"), drafts),
    st.tuples(st.just("depth"), st.integers(0, MAX_DEPTH)))


@st.composite
def schedules(draw: st.DrawFn) -> list[tuple[str, object]]:
    out: list[tuple[str, object]] = [("swap", draw(drafts))]
    asked = 0
    for kind, value in [("ask", 0), *draw(st.lists(actions, min_size=12, max_size=40))]:
        if kind == "ask":
            if asked == 8:
                continue
            value, asked = draw(requests(asked)), asked + 1
        out.append((kind, value))
    return out


@settings(max_examples=max(40, settings().max_examples - 100))     # 300 with the explore profile
@given(schedule=schedules(), max_batch=st.integers(1, 4), chunk=st.sampled_from([3, 7, 64]), catch_up=st.sampled_from([2, 5, 256]))
def test_any_schedule_is_exact(world: World, schedule: list[tuple[str, object]], max_batch: int, chunk: int, catch_up: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tide_pipeline.engine.embedded.BUFFER_ROWS", catch_up)
        patch.setattr(SpeculationController, "can_pay", lambda control, ms: catch_up == 5)     # full buffers: fed at 5, given up at 2
        _play(world, schedule, max_batch, chunk, patch)


def _play(world: World, schedule: list[tuple[str, object]], max_batch: int, chunk: int, patch: pytest.MonkeyPatch) -> None:
    sink = RecordingSink()
    engine = tiny_engine(world.folder, spec=world.target.spec, sink=sink, max_batch=max_batch, prefill_chunk=chunk)
    asked: dict[str, tuple[GenerationRequest, Answer]] = {}
    streams = []
    for kind, value in schedule:
        if kind == "step":
            for _ in range(value):  # type: ignore[call-overload]
                engine.step()
        elif kind == "ask":
            assert isinstance(value, GenerationRequest)
            answer = Answer()
            streams.append(engine.submit(value, answer))
            asked[value.request_id] = (value, answer)
        elif kind == "cancel" and streams:
            streams[value % len(streams)].cancel()  # type: ignore[operator]
        elif kind == "swap":
            engine.set_drafts({tag: world.builds[i] for tag, i in value.items()})  # type: ignore[attr-defined]
        elif kind == "depth":                              # the controller's mind, changed at will: off, on, deeper
            patch.setattr(SpeculationController, "plan", forced(value))
    drain(engine)
    _judge(world.target, engine, sink, asked)


def forced(depth: int) -> Callable[..., Plan]:
    """A plan of the test's own: up to `depth`, other lengths for neighbouring requests, and greedy ones by confidence at odd depths."""
    def plan(control: SpeculationController, slots: Sequence[Slot], context: int) -> Plan:
        wanted = [max(depth - i % 3, min(depth, 1)) if slot.fixed is None else slot.fixed for i, slot in enumerate(slots)]
        lengths = [0 if slot.survival is None else min(slot.cap, k) for slot, k in zip(slots, wanted, strict=True)]
        limits = [min(slot.cap, MAX_DEPTH) if k and depth % 2 and slot.fixed is None and slot.is_greedy else 0
                  for slot, k in zip(slots, lengths, strict=True)]
        return Plan(lengths, limits=limits, worth=Worth(0.2 * depth, (0.1,) * MAX_DEPTH))
    return plan


# --- what must hold -----------------------------------------------------------------------------------------------

def _judge(target: Target, engine: EmbeddedEngine, sink: RecordingSink, asked: dict[str, tuple[GenerationRequest, Answer]]) -> None:
    for request_id, (request, answer) in asked.items():
        assert answer.finish_reason in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.CANCELLED), answer.last.error
        prompt, how = engine.codec.encode(request.prompt), request.sampling
        assert len(answer.tokens) <= how.max_tokens and answer.last.num_output_tokens == len(answer.tokens)
        if how.temperature == 0.0:
            count_ties(target, prompt, answer.tokens)
        _judge_end(engine, request, answer)
        if request_id in sink.requests:
            _judge_events(target, sink, request, prompt, answer)
        else:
            assert answer.finish_reason is FinishReason.CANCELLED and not answer.tokens
    _judge_counters(engine, sink, asked)


def _judge_end(engine: EmbeddedEngine, request: GenerationRequest, answer: Answer) -> None:
    """It ends on the token plain decoding would end on, and the text stops before a stop string."""
    how, text = request.sampling, engine.codec.decode(answer.tokens)
    stops = [s for s in how.stop if s in text]
    if not how.ignore_eos:
        assert 0 not in answer.tokens[:-1]
    if answer.finish_reason is FinishReason.CANCELLED:
        return
    assert all(s not in answer.text for s in how.stop)
    if stops:
        assert answer.finish_reason is FinishReason.STOP
        assert all(s not in engine.codec.decode(answer.tokens[:-1]) for s in how.stop), "tokens after a stop string"
        assert text.startswith(answer.text)
    else:
        assert answer.text == text
        ended = bool(answer.tokens) and answer.tokens[-1] == 0 and not how.ignore_eos
        assert answer.finish_reason is (FinishReason.STOP if ended else FinishReason.LENGTH)
        assert ended or len(answer.tokens) == how.max_tokens


def _judge_events(target: Target, sink: RecordingSink, request: GenerationRequest, prompt: list[int], answer: Answer) -> None:
    seen = sink.requests[request.request_id]
    sequence = [*prompt, *answer.tokens]
    at = 0
    for event in seen.events:
        assert event.start_pos == at, "a position twice, or left out"
        assert list(event.row_tokens) == sequence[at : at + len(event.row_tokens)]
        at += len(event.row_tokens)
        assert 0 <= event.accepted <= len(event.drafted) <= MAX_DEPTH and event.draft_length == len(event.drafted)
        assert event.drafted[: event.accepted] == event.emitted[: event.accepted]
        if event.kind is StepKind.PREFILL:
            assert not event.drafted and len(event.emitted) <= 1
            continue
        assert (event.kind is StepKind.DECODE) == (not event.drafted)
        assert len(event.row_tokens) == len(event.emitted) >= 1
        if event.accepted < len(event.drafted):
            assert len(event.emitted) == event.accepted + 1
        if request.speculation not in ("auto", "off"):
            assert len(event.drafted) <= int(request.speculation)
    assert seen.emitted == answer.tokens
    if answer.tokens:
        assert at == len(sequence) - 1, "all but the last token are consumed, once"
    if at:
        assert_states_match(target, sequence[:at], seen.rows)
    versions = {event.draft_version for event in seen.events if event.kind is not StepKind.PREFILL}
    assert len(versions) <= 1, f"one request, drafts {versions}"
    assert request.speculation not in ("off", "0") or not any(event.drafted for event in seen.events)
    assert seen.closed is not None and seen.closed.finish_reason is answer.finish_reason
    assert seen.closed.num_output_tokens == len(answer.tokens)
    steps = [event for event in seen.events if event.kind is not StepKind.PREFILL]
    assert answer.last.target_steps == len(steps)
    assert answer.last.verify_steps == sum(bool(e.drafted) for e in steps)
    assert answer.last.drafted_tokens == sum(len(e.drafted) for e in steps)
    assert answer.last.accepted_tokens == sum(e.accepted for e in steps)


def _judge_counters(engine: EmbeddedEngine, sink: RecordingSink, asked: dict[str, tuple[GenerationRequest, Answer]]) -> None:
    stats, last = engine.stats(), [answer.last for _, answer in asked.values()]
    assert not busy(engine) and stats.kv_tokens_used == 0
    assert (stats.requests_finished, stats.requests_failed, stats.sink_errors) == (len(asked), 0, 0)
    assert stats.tokens_out == sum(chunk.num_output_tokens for chunk in last)
    assert stats.target_steps == sum(chunk.target_steps for chunk in last)
    assert stats.verify_steps == sum(chunk.verify_steps for chunk in last)
    assert stats.drafted_tokens == sum(chunk.drafted_tokens for chunk in last)
    assert stats.accepted_tokens == sum(chunk.accepted_tokens for chunk in last)
    assert stats.prompt_tokens == sum(len(e.row_tokens) for s in sink.requests.values() for e in s.events if e.kind is StepKind.PREFILL)
    assert all(not draft.members for draft in engine._drafts.values())


# --- single stories -----------------------------------------------------------------------------------------------

def test_plain_and_speculative_answers_are_the_same_tokens(world: World) -> None:
    prompts = ["".join(LETTERS[(i * j) % 8] for j in range(1, 3 + 4 * i)) for i in range(1, 9)]
    plain = generate(tiny_engine(world.folder, spec=world.target.spec, max_batch=8),
                     *[ask(str(i), p, speculation="off", max_tokens=30) for i, p in enumerate(prompts)])
    for length in range(1, MAX_DEPTH + 1):
        engine = tiny_engine(world.folder, spec=world.target.spec, drafts=world.builds[0], max_batch=8)
        drafted = generate(engine, *[ask(str(i), p, speculation=str(length), max_tokens=30) for i, p in enumerate(prompts)])
        for want, got in zip(plain, drafted, strict=True):
            assert (got.tokens, got.text) == (want.tokens, want.text)
        assert 0.1 < engine.stats().accepted_tokens / engine.stats().drafted_tokens < 1.0


def _drafted_by_position(sink: RecordingSink, request_id: str) -> dict[int, tuple[int, ...]]:
    return {event.start_pos: event.drafted for event in sink.requests[request_id].events if event.drafted}


def _drafts_with_and_without_a_pause(target_dir: Path, spec: EngineSpec, build: EngineBuild, off_for: int, tokens: int,
                                     patch: pytest.MonkeyPatch) -> list[list[dict[int, tuple[int, ...]]]]:
    seen = []
    for pause in (0, off_for):
        sink = RecordingSink()
        engine = tiny_engine(target_dir, spec=spec, drafts=build, sink=sink)
        for i, prompt in enumerate(("abcd", "hgfedcba")):
            submit(engine, ask(f"r{i}", prompt, max_tokens=tokens, ignore_eos=True))
        patch.setattr(SpeculationController, "plan", forced(0))
        for _ in range(pause):
            engine.step()
        patch.setattr(SpeculationController, "plan", forced(2))
        drain(engine)
        seen.append([_drafted_by_position(sink, f"r{i}") for i in range(2)])
    return seen


def _assert_as_if_never_off(always: dict[int, tuple[int, ...]], paused: dict[int, tuple[int, ...]], off_for: int) -> None:
    shared = always.keys() & paused.keys()
    assert paused and min(paused) >= off_for and len(shared) >= 3
    for at in shared:
        n = min(len(always[at]), len(paused[at]))                # lengths follow the slots, which the two may hold in another order
        assert paused[at][:n] == always[at][:n]


@pytest.mark.parametrize("off_for", [3, 40])
def test_after_a_pause_it_drafts_as_if_it_had_never_paused(world: World, monkeypatch: pytest.MonkeyPatch, off_for: int) -> None:
    """Draft length 0 leaves no stale KV: buffered states catch up in one pass."""
    for always, paused in zip(*_drafts_with_and_without_a_pause(world.folder, world.target.spec, world.builds[0], off_for, 60, monkeypatch),
                              strict=True):
        _assert_as_if_never_off(always, paused, off_for)


def test_off_for_200_tokens_then_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tiny_spec(max_context=300, max_draft_length=MAX_DEPTH)
    target = Target(write_tiny_target(tmp_path / "target", vocab=27, layers=3, max_positions=320), spec)
    build = write_tiny_build(tmp_path / "build", target)
    for always, paused in zip(*_drafts_with_and_without_a_pause(tmp_path / "target", spec, build, 200, 280, monkeypatch), strict=True):
        _assert_as_if_never_off(always, paused, 200)


def test_a_swap_leaves_requests_in_flight_on_their_draft(world: World) -> None:
    good, _, useless = world.builds
    sink = RecordingSink()
    engine = tiny_engine(world.folder, spec=world.target.spec, drafts=good, sink=sink)
    submit(engine, ask("before", "abc", speculation="3", max_tokens=40, ignore_eos=True))
    for _ in range(4):
        engine.step()
    engine.set_drafts({"*": useless})
    submit(engine, ask("after", "abc", speculation="3", max_tokens=20, ignore_eos=True))
    drain(engine)
    versions = {name: {e.draft_version for e in seen.events if e.drafted} for name, seen in sink.requests.items()}
    assert versions == {"before": {"good"}, "after": {"useless"}}
    assert engine.stats().drafts == {"*": "useless"}


def test_each_workload_has_its_draft_and_the_rest_the_default(world: World) -> None:
    good, reduced, useless = world.builds
    sink = RecordingSink()
    engine = tiny_engine(world.folder, spec=world.target.spec, drafts={"a": good, "b": reduced, "*": useless}, sink=sink)
    generate(engine, *[ask(tag, "abcabc", workload=tag, speculation="2", max_tokens=10, ignore_eos=True) for tag in ("a", "b", "c")])
    assert {name: {e.draft_version for e in seen.events if e.drafted} for name, seen in sink.requests.items()} == {
        "a": {"good"}, "b": {"reduced"}, "c": {"useless"}}


@pytest.mark.parametrize("when", [27, 28, 29, 30])
def test_padding_at_the_end_of_the_context_stays_inside_the_caches(tmp_path: Path, world: World, when: int) -> None:
    """One request at its last positions, another with eight waiting draft rows: the padded pass reaches past the first one's end."""
    spec = tiny_spec(max_context=40, max_draft_length=1)
    target = Target(world.folder, spec)
    engine = tiny_engine(world.folder, spec=spec, drafts=write_tiny_build(tmp_path, target), max_batch=2)
    long = submit(engine, ask("long", "a" * 8, speculation="1", max_tokens=32, ignore_eos=True))
    while len(long.tokens) < when:
        engine.step()
    short = submit(engine, ask("short", "b" * 8, speculation="1", max_tokens=20, ignore_eos=True))
    drain(engine)
    assert (long.finish_reason, short.finish_reason) == (FinishReason.LENGTH, FinishReason.LENGTH), long.last.error
    assert (len(long.tokens), len(short.tokens)) == (32, 20)
