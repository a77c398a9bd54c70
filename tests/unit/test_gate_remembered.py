"""What the champion does on held-out windows, kept while its challenger trains: the same numbers, and only for the draft they are of."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests.fakes_training import captured, open_target, random_draft, tiny_engine
from tide_pipeline.capture.reader import WindowStates
from tide_pipeline.gate import remembered
from tide_pipeline.gate.remembered import Remembered
from tide_pipeline.models.eagle3 import Eagle3Draft
from tide_pipeline.models.target import Target
from tide_pipeline.training import acceptance
from tide_pipeline.training.acceptance import replay


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return open_target(tiny_engine(tmp_path_factory.mktemp("remembered")))


@pytest.fixture(scope="module")
def draft(target: Target) -> Eagle3Draft:
    return random_draft(target.shape)


@pytest.fixture
def windows(target: Target) -> list[WindowStates]:
    return captured(target, "py", 5, prompt=7, output=30) + captured(target, "de", 3, prompt=4, output=12, seed=2)


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the requests that were replayed."""
    seen: list[str] = []

    def counted(draft, head, states, draft_length):  # type: ignore[no-untyped-def]
        seen.extend(s.window.request_id for s in states)
        return real(draft, head, states, draft_length)

    real = acceptance.replay_windows
    monkeypatch.setattr(remembered, "replay_windows", counted)
    return seen


def test_only_what_is_new_is_replayed_to_the_same_numbers(tmp_path: Path, target: Target, draft: Eagle3Draft, windows: list[WindowStates],
                                                          replayed: list[str]) -> None:
    memory = Remembered.open(tmp_path / "replays.json", "aa", target.digest, 3)
    memory.replay(lambda: draft, target, windows[:5])
    memory.save(w.window for w in windows[:5])
    again = Remembered.open(tmp_path / "replays.json", "aa", target.digest, 3)
    replayed.clear()
    moved = [dataclasses.replace(w, window=dataclasses.replace(w.window, uri="elsewhere", row=99)) for w in windows]
    assert again.replay(lambda: draft, target, moved) == list(replay(draft, target, windows, 3))
    assert replayed == [w.window.request_id for w in windows[5:]]


def test_another_label_counts_as_it_is_called_now(tmp_path: Path, target: Target, draft: Eagle3Draft, windows: list[WindowStates]) -> None:
    """Windows from before the drift are a workload of their own: that is decided when the gate asks."""
    memory = Remembered.open(None, "aa", target.digest, 3)
    before = memory.replay(lambda: draft, target, windows)
    earlier = [dataclasses.replace(w, window=dataclasses.replace(w.window, workload="py (earlier)")) for w in windows]
    assert memory.replay(lambda: draft, target, earlier) == [dataclasses.replace(one, workload="py (earlier)") for one in before]


@pytest.mark.parametrize("other", [("bb", 3), ("aa", 4)])
def test_another_draft_or_draft_length_knows_nothing(tmp_path: Path, target: Target, draft: Eagle3Draft, windows: list[WindowStates],
                                                     replayed: list[str], other: tuple[str, int]) -> None:
    memory = Remembered.open(tmp_path / "replays.json", "aa", target.digest, 3)
    memory.replay(lambda: draft, target, windows)
    memory.save(w.window for w in windows)
    replayed.clear()
    digest, draft_length = other
    found = Remembered.open(tmp_path / "replays.json", digest, target.digest, draft_length).replay(lambda: draft, target, windows)
    assert len(replayed) == len(windows) and found == list(replay(draft, target, windows, draft_length))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"of": "aa on tt", "draft_length": 3, "walks": {"x": 5}}', "null"])
def test_a_damaged_file_knows_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "replays.json").write_text(text)
    assert not Remembered.open(tmp_path / "replays.json", "aa", "tt", 3).walks


def test_the_file_holds_no_request_and_forgets_what_is_not_judged_on(tmp_path: Path, target: Target, draft: Eagle3Draft,
                                                                     windows: list[WindowStates]) -> None:
    memory = Remembered.open(tmp_path / "replays.json", "aa", target.digest, 3)
    memory.replay(lambda: draft, target, windows)
    memory.save(w.window for w in windows[:2])
    text = (tmp_path / "replays.json").read_text()
    assert len(json.loads(text)["walks"]) == 2
    assert not any(w.window.request_id in text or w.window.prompt_digest in text for w in windows)
