"""Events in, Parquet out: windows, acceptance rows, opting out, errors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from tests.fakes_capture import ENGINE, HIDDEN, SLOW, TAPS, TARGET, FakeEngine, make_recorder, make_ring, states_of, token_at
from tide_pipeline.capture.reader import WindowStates, list_windows, live_shards, read_states
from tide_pipeline.capture.recorder import Recorder
from tide_pipeline.capture.windows import prompt_digest
from tide_pipeline.config import CaptureSettings
from tide_pipeline.contracts import FinishReason, RequestClosed, RequestOpened, SamplingParams, StepEvent, StepKind


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    made = make_recorder(tmp_path)
    yield made
    made.close()


def read_all(lake: Path) -> list[WindowStates]:
    index = list_windows(lake / "signals", TARGET)
    assert index.skipped == []
    return sorted(read_states(index.windows, strict=True), key=lambda s: (s.window.request_id, s.window.start_pos))


def acceptance(lake: Path) -> list[dict[str, Any]]:
    tables = [pq.ParquetFile(path).read() for path in live_shards(lake / "acceptance", TARGET)]
    return [row for table in tables for row in table.to_pylist()]


def assert_is_truth(states: WindowStates) -> None:
    window, rows = states.window, range(states.window.start_pos, states.window.start_pos + states.window.num_rows)
    assert states.token_ids.tolist() == [token_at(window.request_id, p) for p in [*rows, rows.stop]]
    width = HIDDEN * (TAPS + (states.final_TD is not None))
    truth_TW = states_of(window.request_id, rows, width)
    assert torch.equal(states.taps_TG, truth_TW[:, :HIDDEN * TAPS])
    if states.final_TD is not None:
        assert torch.equal(states.final_TD, truth_TW[:, HIDDEN * TAPS:])


def test_a_request_becomes_one_window(recorder: Recorder, tmp_path: Path) -> None:
    engine = FakeEngine(recorder)
    engine.open("r1", 6, sampling=SamplingParams(temperature=0.8, seed=2**64 - 1))
    engine.prefill("r1", 4, last=False)
    engine.prefill("r1", 2)
    engine.step("r1", 2, 3)
    engine.step("r1", 0, 0, kind=StepKind.DECODE)
    engine.close("r1")
    assert recorder.flush()
    (states,) = read_all(tmp_path)
    assert_is_truth(states)
    window = states.window
    assert (window.start_pos, window.num_rows, window.num_prompt_tokens) == (0, 10, 6)
    assert (window.tenant, window.workload, window.draft_version, window.engine_digest) == ("acme", "prose", "v1", ENGINE)
    assert window.temperature == 0.8
    row = pq.ParquetFile(window.uri).read().to_pylist()[0]
    assert row["rejected"] == [{"position": 9, "token": token_at("r1", 9) + 1}]
    assert row["sampling"]["seed"] == -1                 # the bits of 2**64 - 1
    assert recorder.stats()["captured_tokens"] == 10


def test_every_window_has_the_digest_of_the_whole_prompt(tmp_path: Path) -> None:
    """However the prompt was chunked, whatever of it was captured, and whoever asked: equal prompts, equal digests."""
    recorder = make_recorder(tmp_path, max_window_rows=4)
    engine = FakeEngine(recorder)
    prompt = tuple(token_at("whole", p) for p in range(9))
    for name in ("whole", "chunked", "lost", "unseen"):
        engine.positions[name] = 0
        recorder.on_open(RequestOpened(name, name, name, prompt, SamplingParams(), "auto"))
    engine.prefill("whole", 9)
    for rows in (4, 4, 1):
        engine.prefill("chunked", rows, last=rows == 1)
    engine.prefill("lost", 9, lost=True)
    engine.prefill("unseen", 9, told=False)
    for name in ("whole", "chunked", "lost", "unseen"):
        engine.step(name, 2, 3)
        engine.close(name)
    engine.run("shorter", 8)
    recorder.close()
    found: dict[str, set[str]] = {}
    for states in read_all(tmp_path):
        found.setdefault(states.window.request_id, set()).add(states.window.prompt_digest)
    assert found["whole"] == found["chunked"] == found["lost"] == found["unseen"] == {prompt_digest(prompt)}
    assert len(found) == 5 and found["shorter"].isdisjoint(found["whole"])
    assert prompt_digest((1, 2)) == hashlib.sha256(b"\1\0\0\0\2\0\0\0").hexdigest()[:32], "anyone can compute it again"


def test_requests_interleave(recorder: Recorder, tmp_path: Path) -> None:
    engine = FakeEngine(recorder)
    for name in ("a", "b"):
        engine.open(name, 3)
        engine.prefill(name, 3)
    for accepted in (1, 3, 0):
        for name in ("a", "b"):
            engine.step(name, accepted, 3)
    engine.close("b")
    engine.close("a")
    recorder.flush()
    a, b = read_all(tmp_path)
    assert_is_truth(a)
    assert_is_truth(b)
    assert a.window.num_rows == b.window.num_rows == 3 + 2 + 4 + 1


@pytest.mark.parametrize("how", [{"lost": True}, {"told": False}])
def test_a_dropped_row_splits_the_window(recorder: Recorder, tmp_path: Path, how: dict[str, bool]) -> None:
    engine = FakeEngine(recorder)
    engine.open("r", 3)
    engine.prefill("r", 3)
    engine.step("r", 1, 3)
    engine.step("r", 2, 3, **how)
    engine.step("r", 3, 3)
    engine.close("r")
    recorder.flush()
    first, second = read_all(tmp_path)
    assert_is_truth(first)
    assert_is_truth(second)
    assert (first.window.start_pos, first.window.num_rows) == (0, 5)
    assert (second.window.start_pos, second.window.num_rows) == (8, 4)


def test_a_prefill_that_never_went_on_gives_up_its_last_row(recorder: Recorder, tmp_path: Path) -> None:
    engine = FakeEngine(recorder)
    engine.open("r", 9)
    engine.prefill("r", 4, last=False)
    engine.close("r", FinishReason.CANCELLED)
    recorder.flush()
    (states,) = read_all(tmp_path)
    assert states.window.num_rows == 3                   # the token after row 3 was never seen
    assert_is_truth(states)


def test_a_recomputed_prefix_is_not_stored_twice(recorder: Recorder, tmp_path: Path) -> None:
    engine = FakeEngine(recorder)
    engine.open("r", 4)
    engine.prefill("r", 4)
    engine.step("r", 1, 3)
    engine.positions["r"] = 0                            # preempted: the engine computes all of it again, and one row more
    engine.prefill("r", 7)
    engine.step("r", 2, 3)
    engine.close("r")
    recorder.flush()
    (states,) = read_all(tmp_path)
    assert states.window.num_rows == 10
    assert_is_truth(states)


def test_a_long_request_becomes_several_windows(tmp_path: Path) -> None:
    recorder = make_recorder(tmp_path, max_window_rows=100)
    engine = FakeEngine(recorder)
    engine.open("r", 230)
    engine.prefill("r", 90, last=False)
    engine.prefill("r", 140)
    for _ in range(20):
        engine.step("r", 2, 3)
    engine.close("r")
    recorder.close()
    found = read_all(tmp_path)
    assert [(s.window.start_pos, s.window.num_rows) for s in found] == [(0, 100), (100, 100), (200, 90)]
    for states in found:
        assert_is_truth(states)


def test_an_engine_without_soft_targets(tmp_path: Path) -> None:
    recorder = make_recorder(tmp_path)
    FakeEngine(recorder, make_ring(with_final=False)).run("r")
    recorder.close()
    (states,) = read_all(tmp_path)
    assert states.final_TD is None
    assert_is_truth(states)


def test_acceptance_blocks(tmp_path: Path) -> None:
    recorder = make_recorder(tmp_path, CaptureSettings(mode="off", flush_s=3600.0, block_steps=4))
    engine = FakeEngine(recorder)
    engine.open("r", 3)
    engine.prefill("r", 3)
    for accepted in (3, 1, 0, 2, 3):
        engine.step("r", accepted, 3)
    engine.step("r", 1, 2)
    engine.step("r", 0, 3, kind=StepKind.PROBE)
    engine.step("r", 0, 0, kind=StepKind.DECODE)
    engine.close("r", FinishReason.STOP)
    recorder.close()
    rows = acceptance(tmp_path)
    assert [(r["draft_length"], r["is_probe"], r["num_steps"], r["drafted"], r["accepted"], r["emitted_tokens"]) for r in rows] == [
        (3, False, 4, [4, 4, 4], [3, 2, 1], 10), (3, False, 1, [1, 1, 1], [1, 1, 1], 4), (2, False, 1, [1, 1], [1, 0], 2),
        (3, True, 1, [1, 1, 1], [0, 0, 0], 1), (0, False, 1, [], [], 1)]
    assert [r["finish_reason"] for r in rows] == ["", "", "", "", "stop"]
    assert [r["ttft_ms"] for r in rows] == [0, 0, 0, 0, 12.5]
    assert rows[0]["mean_batch_size"] == 2 and rows[0]["duration_ms"] == 6.0
    assert {r["replica"] for r in rows} == {"replica-0"} and {r["engine_digest"] for r in rows} == {ENGINE}
    with pytest.raises(Exception, match="no signals"):
        list_windows(tmp_path / "signals", TARGET)


def test_a_request_without_steps_still_has_a_row(recorder: Recorder, tmp_path: Path) -> None:
    engine = FakeEngine(recorder)
    engine.open("r", 3)
    engine.close("r", FinishReason.CANCELLED)
    recorder.flush()
    (row,) = acceptance(tmp_path)
    assert (row["num_steps"], row["emitted_tokens"], row["drafted"], row["finish_reason"]) == (0, 0, [], "cancelled")


def test_opted_out_tenants_have_acceptance_and_no_signals(tmp_path: Path) -> None:
    recorder = make_recorder(tmp_path, CaptureSettings(mode="on", flush_s=3600.0, opted_out_tenants=("secretive",)))
    engine = FakeEngine(recorder)
    engine.run("a", tenant="secretive")
    engine.run("b")
    recorder.close()
    assert {row["request_id"] for row in acceptance(tmp_path)} == {"a", "b"}
    assert [s.window.request_id for s in read_all(tmp_path)] == ["b"]


def test_a_bad_event_costs_its_request_and_raises_nothing(recorder: Recorder, tmp_path: Path) -> None:
    engine = FakeEngine(recorder)
    engine.open("bad", 2)
    engine.open("good", 2)
    engine.prefill("bad", 2)
    engine.ring.next_slot()
    handle = engine.ring.put(torch.zeros(1, HIDDEN * TAPS), torch.zeros(1, HIDDEN))
    recorder.on_step([StepEvent("bad", StepKind.DECODE, 2, (1, 2), (3,), (), 0, "v1", 0, 1, 1.0, handle),
                      StepEvent("never opened", StepKind.DECODE, 2, (1, 2), (3,), (), 0, "v1", 0, 1, 1.0, handle)])
    engine.prefill("good", 2)
    engine.close("bad")
    engine.close("good")
    recorder.flush()
    assert recorder.stats()["recorder_errors"] == 1
    assert [(s.window.request_id, s.window.num_rows) for s in read_all(tmp_path)] == [("bad", 2), ("good", 2)]


def test_hostile_text_in_tags_costs_nothing(recorder: Recorder, tmp_path: Path) -> None:
    engine = FakeEngine(recorder)
    recorder.on_open(_opened("\ud800../../x"))
    recorder.on_close(_closed("\ud800../../x"))
    engine.run("fine", workload="a/b\n=")
    assert recorder.flush()
    assert {row["request_id"] for row in acceptance(tmp_path)} == {"?../../x", "fine"}
    assert read_all(tmp_path)[0].window.workload == "a/b\n="


def test_auto_mode_follows_acceptance_and_the_swap(tmp_path: Path) -> None:
    recorder = make_recorder(tmp_path, CaptureSettings(mode="auto", flush_s=3600.0, init_requests=4))
    engine = FakeEngine(recorder)
    for i in range(4):
        engine.run(f"warm{i}")
    assert recorder.stats()["collecting.prose"] is False
    engine.open("in flight", 2)                         # began under the old draft: its acceptance says nothing of the new one
    recorder.on_drafts_changed()
    engine.step("in flight", 0, 3)
    engine.close("in flight")
    assert "observed_requests.prose" not in recorder.stats()
    engine.run("after")
    assert recorder.stats()["collecting.prose"] is True
    assert recorder.stats()["observed_requests.prose"] == 1
    recorder.close()


def test_events_before_attach_are_harmless(tmp_path: Path) -> None:
    recorder = Recorder(SLOW, TARGET, tmp_path, "replica-0")
    recorder.on_open(_opened("r"))
    recorder.on_close(_closed("r"))
    recorder.close()
    assert len(acceptance(tmp_path)) == 1


def _opened(request_id: str) -> RequestOpened:
    return RequestOpened(request_id, "prose", "acme", (1, 2, 3), SamplingParams(), "auto")


def _closed(request_id: str) -> RequestClosed:
    return RequestClosed(request_id, FinishReason.STOP, 1.0, 2.0, 0)
