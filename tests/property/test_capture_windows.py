"""Any schedule of requests, steps, lost states, unseen steps and recomputed prefixes gives back exactly the rows that were seen."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fakes_capture import HIDDEN, TAPS, TARGET, FakeEngine, make_recorder, make_ring, states_of, token_at
from tide_pipeline.capture.reader import list_windows, read_states
from tide_pipeline.errors import NotEnoughSignals


@dataclass(frozen=True)
class Step:
    accepted: int
    drafted: int
    fate: str                              # seen, lost (no states), untold (no event)


@dataclass(frozen=True)
class Plan:
    prefill: list[tuple[int, str]]         # rows of each chunk, fate
    steps: list[Step]


fates = st.sampled_from(["seen"] * 6 + ["lost", "untold"])
steps = st.builds(lambda drafted, share, fate: Step(int(drafted * share), drafted, fate),
                  st.integers(0, 5), st.floats(0, 1), fates)
plans = st.builds(Plan, st.lists(st.tuples(st.integers(1, 9), fates), min_size=1, max_size=4), st.lists(steps, max_size=12))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(plans, min_size=1, max_size=3), st.integers(3, 40), st.booleans(), st.randoms(use_true_random=False))
def test_windows_reproduce_the_rows_that_were_seen(todo: list[Plan], max_rows: int, with_final: bool, random: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        recorder = make_recorder(Path(folder), max_window_rows=max_rows)
        engine = FakeEngine(recorder, make_ring(with_final=with_final))
        expected: dict[str, list[range]] = {}
        rejected: dict[str, set[int]] = {}
        scripts = [_script(engine, f"r{i}", plan, expected, rejected) for i, plan in enumerate(todo)]
        while scripts:
            script = random.choice(scripts)  # type: ignore[attr-defined]
            if next(script, None) is None:
                scripts.remove(script)
        recorder.close()
        assert recorder.stats()["recorder_errors"] == 0
        found = _read(Path(folder))
    want = {name: _split(runs, max_rows) for name, runs in expected.items()}
    assert {name: [(s.start, s.stop) for s in spans] for name, spans in want.items() if spans} == {
        name: [(w.window.start_pos, w.window.start_pos + w.window.num_rows) for w in windows] for name, windows in found.items()}
    for name, windows in found.items():
        for states in windows:
            span = range(states.window.start_pos, states.window.start_pos + states.window.num_rows)
            truth_TW = states_of(name, span, HIDDEN * (TAPS + with_final))
            assert torch.equal(states.taps_TG, truth_TW[:, :HIDDEN * TAPS])
            assert (states.final_TD is None) == (not with_final)
            assert states.final_TD is None or torch.equal(states.final_TD, truth_TW[:, HIDDEN * TAPS:])
            assert states.token_ids.tolist() == [token_at(name, p) for p in range(span.start, span.stop + 1)]


def _script(engine, name, plan, expected, rejected):  # type: ignore[no-untyped-def]
    """Feed one request, a step per `next`; note the runs of rows that must come back."""
    runs: list[range] = []
    expected[name] = runs
    engine.open(name, sum(rows for rows, _ in plan.prefill))
    follower_known = True
    for i, (rows, fate) in enumerate(plan.prefill):
        start, last = engine.positions[name], i == len(plan.prefill) - 1
        follower_known = _note(runs, start, rows, fate, follower_known, emits=last)
        engine.prefill(name, rows, last=last, lost=fate == "lost", told=fate != "untold")
        yield True
    for step in plan.steps:
        follower_known = _note(runs, engine.positions[name], step.accepted + 1, step.fate, follower_known, emits=True)
        engine.step(name, step.accepted, step.drafted, lost=step.fate == "lost", told=step.fate != "untold")
        yield True
    if not follower_known:
        _shorten(runs)
    engine.close(name)


def _note(runs: list[range], start: int, rows: int, fate: str, follower_known: bool, *, emits: bool) -> bool:
    """Extend the last run or begin one; an unseen step after a chunk whose next token nobody told costs the chunk's last row."""
    if fate == "seen":
        if runs and runs[-1].stop == start:
            runs[-1] = range(runs[-1].start, start + rows)
        else:
            runs.append(range(start, start + rows))
        return emits
    if fate == "untold" and not follower_known:
        _shorten(runs)
    return True


def _shorten(runs: list[range]) -> None:
    runs[-1] = range(runs[-1].start, runs[-1].stop - 1)


def _split(runs: list[range], max_rows: int) -> list[range]:
    return [range(at, min(run.stop, at + max_rows)) for run in runs for at in range(run.start, run.stop, max_rows)]


def _read(lake: Path):  # type: ignore[no-untyped-def]
    try:
        index = list_windows(lake / "signals", TARGET)
    except NotEnoughSignals:
        return {}
    assert index.skipped == []
    found: dict[str, list] = {}
    for states in sorted(read_states(index.windows, strict=True), key=lambda s: s.window.start_pos):
        found.setdefault(states.window.request_id, []).append(states)
    return found
