"""The replay of captured windows against the engine's own count: the same steps where it is greedy, the same rate where it samples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers import Answer, ask, drain, tiny_engine, write_tiny_build
from tide_pipeline.capture.reader import WindowStates, list_windows, read_states
from tide_pipeline.capture.recorder import Recorder
from tide_pipeline.config import CaptureSettings
from tide_pipeline.contracts import EngineBuild, TokenChunk
from tide_pipeline.models.checkpoint import DraftIdentity, load_draft
from tide_pipeline.models.eagle3 import Eagle3Draft
from tide_pipeline.models.target import Target
from tide_pipeline.training.acceptance import Replay, replay

PROMPTS = [f"{word} {i}" for i, word in enumerate(("one", "two", "a longer prompt", "x", "seven", "words of it", "end", "the last one"))]


def identity(target: Target) -> DraftIdentity:
    return DraftIdentity(target.spec.name, target.digest, target.spec.capture_layers)


def serve(target_dir: Path, build: EngineBuild, lake: Path, times: int, **how: object) -> tuple[dict[str, TokenChunk], list[WindowStates]]:
    """Every prompt for as many tokens as its turn says; the last chunk of each, which has the engine's counts, and the windows."""
    lake.mkdir()
    recorder = Recorder(CaptureSettings(mode="on"), "tiny", lake, "r")
    engine = tiny_engine(target_dir, drafts=build, sink=recorder, queue_size=1_000)
    answers: dict[str, Answer] = {}
    for i, prompt in enumerate(PROMPTS * times):
        answers[f"r{i}"] = Answer()
        engine.submit(ask(f"r{i}", prompt, max_tokens=2 + 5 * i % 37, seed=i, deadline_s=3600, **how), answers[f"r{i}"])     # type: ignore[arg-type]
    drain(engine)
    engine.close()
    windows = list(read_states(list_windows(lake / "signals", "tiny").windows, strict=True))
    return {name: answer.chunks[-1] for name, answer in answers.items()}, windows


def by_request(draft: Eagle3Draft, target: Target, windows: list[WindowStates], draft_length: int) -> dict[str, Replay]:
    return {w.window.request_id: found for w in windows for found in replay(draft, target, [w], draft_length)}


@pytest.mark.parametrize("draft_length", [1, 3, 4])
@pytest.mark.parametrize("reduced", [False, True])
def test_greedy_steps_are_the_engines_own(tmp_path: Path, tiny_dir: Path, tiny_target: Target, draft_length: int, reduced: bool) -> None:
    """Request by request, to the step: short requests, ends by length and by end-of-text, and drafts that end before them."""
    build = write_tiny_build(tmp_path, tiny_target, noise=0.4, vocabulary=torch.arange(0, 257, 2) if reduced else None)
    draft = load_draft(tmp_path / "draft", tiny_target.shape, identity(tiny_target))
    served, windows = serve(tiny_dir, build, tmp_path / "lake", 4, speculation=str(draft_length))
    replays = by_request(draft, tiny_target, windows, draft_length)
    for name, chunk in served.items():
        found = replays.get(name)
        assert (found.steps, sum(found.accepted)) == (chunk.verify_steps, chunk.accepted_tokens) if found else chunk.verify_steps == 0
    assert sum(chunk.accepted_tokens for chunk in served.values()) > 20


@pytest.mark.parametrize(("how", "reduced"), [({"temperature": 1.0}, False), ({"temperature": 0.7, "top_k": 40, "top_p": 0.9}, True)])
def test_sampled_acceptance_is_promised_to_within_its_own_luck(tmp_path: Path, tiny_dir: Path, tiny_target: Target, how: dict[str, float],
                                                               reduced: bool) -> None:
    """The engine's accepted tokens and steps differ from their expectations given the text by what accepting at random explains."""
    build = write_tiny_build(tmp_path, tiny_target, noise=0.8, vocabulary=torch.arange(0, 257, 2) if reduced else None)
    draft = load_draft(tmp_path / "draft", tiny_target.shape, identity(tiny_target))
    served, windows = serve(tiny_dir, build, tmp_path / "lake", 12, speculation="3", **how)
    replays = by_request(draft, tiny_target, windows, 3)
    missed = torch.tensor([[chunk.accepted_tokens - sum(replays[name].accepted), chunk.verify_steps - replays[name].steps]
                           for name, chunk in served.items() if name in replays], dtype=torch.float64)
    accepted = sum(chunk.accepted_tokens for chunk in served.values())
    luck = missed.square().sum(0).sqrt()                                     # requests are independent: the standard error of the sum
    assert accepted > 80 and len(missed) > 60
    assert (missed.sum(0).abs() < 2.5 * luck).all() and luck[0] < 0.15 * accepted
