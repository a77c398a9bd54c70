"""Draft row t takes (taps g_t, embedding of x_{t+1}) and predicts x_{t+2}; its soft target is lm_head of the final state of row t + 1.

Captured while the engine generates, on a tiny target and on the pocket target, plain and speculating. Being one row off anywhere is
the classic silent EAGLE bug: nothing fails, acceptance is just low.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.helpers import (
    RecordingSink,
    Seen,
    ask,
    assert_states_match,
    count_ties,
    generate,
    plain_pass,
    random_draft,
    tiny_engine,
    write_tiny_build,
)
from tide_pipeline.contracts import EngineBuild
from tide_pipeline.engine_spec import load_engine_spec
from tide_pipeline.models.target import Target


@dataclass
class Case:
    target_dir: Path
    target: Target
    build: EngineBuild
    prompts: tuple[str, ...]


@pytest.fixture(scope="module")
def tiny(tiny_dir: Path, tiny_target: Target, tiny_build: EngineBuild) -> Case:
    return Case(tiny_dir, tiny_target, tiny_build, ("a", "two words", "a prompt of more than one chunk of sixteen tokens"))


@pytest.fixture(scope="module")
def pocket(pocket_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    spec = load_engine_spec(pocket_dir)
    target = Target(pocket_dir / spec.model, spec)
    champion = pocket_dir / spec.champion if spec.champion else pocket_dir / "nowhere"
    if (champion / "model.safetensors").is_file():
        place = tmp_path_factory.mktemp("champion")
        (place / "draft").symlink_to(champion)
        build = EngineBuild("champion", "pocket", "embedded", str(place), "champion", "", target.digest, 0.0)
    else:
        build = write_tiny_build(tmp_path_factory.mktemp("random"), target, random_draft(target), version="random")
    return Case(pocket_dir / spec.model, target, build, ("def main(argv):\n    ", "The following options are"))


@pytest.fixture(params=["tiny", "pocket"])
def case(request: pytest.FixtureRequest) -> Case:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("speculation", ["off", "1", "4"])
def test_captured_rows_line_up_with_what_was_emitted(case: Case, speculation: str) -> None:
    sink = RecordingSink()
    engine = tiny_engine(case.target_dir, spec=case.target.spec, drafts=case.build, sink=sink)
    answers = generate(engine, *[ask(f"r{i}", prompt, speculation=speculation, max_tokens=32, ignore_eos=True)
                                 for i, prompt in enumerate(case.prompts)])
    for i, answer in enumerate(answers):
        seen, prompt = sink.requests[f"r{i}"], engine.codec.encode(case.prompts[i])
        count_ties(case.target, prompt, answer.tokens)
        _check(case.target, prompt, answer.tokens, seen)
    if speculation == "4" and case.build.draft_version != "random":            # a random draft is right by accident only
        assert engine.stats().accepted_tokens > 0


def _check(target: Target, prompt: list[int], tokens: list[int], seen: Seen) -> None:
    sequence = [*prompt, *tokens]
    assert seen.row_tokens == sequence[:-1] and seen.emitted == tokens
    assert_states_match(target, sequence[:-1], seen.rows)
    final = seen.rows[:, -target.shape.hidden_size:].float()                   # bf16 when stored
    logits = final @ target.lm_head_VD.T
    exact = plain_pass(target, sequence[:-1])[2]
    for t in range(len(prompt) - 2, len(sequence) - 2):                        # rows whose x_{t+2} was generated; -1: the first token's row
        row, label = logits[t + 1], sequence[t + 2]
        tie = 2 * float((row - exact[t + 1]).abs().max()) + 1e-4               # what rounding to bf16 may turn round
        assert float(row.max() - row[label]) <= tie
    hits = sum(int(logits[t + 1].argmax()) == sequence[t + 2] for t in range(len(prompt) - 2, len(sequence) - 2))
    assert hits >= 0.9 * len(tokens), "ties explain some rows, never most"


def test_a_shift_by_one_row_would_be_seen(tiny: Case) -> None:
    """The check above can fail."""
    sink = RecordingSink()
    engine = tiny_engine(tiny.target_dir, drafts=tiny.build, sink=sink)
    answer, = generate(engine, ask("r", "some text", speculation="3", max_tokens=24, ignore_eos=True))
    seen = sink.requests["r"]
    prompt = engine.codec.encode("some text")
    _check(tiny.target, prompt, answer.tokens, seen)
    seen.states = [torch.cat((seen.rows[1:], seen.rows[:1]))]
    with pytest.raises(AssertionError):
        _check(tiny.target, prompt, answer.tokens, seen)


def test_without_soft_targets_only_taps_are_captured(tmp_path: Path, tiny: Case) -> None:
    spec = dataclasses.replace(tiny.target.spec, soft_targets=False)
    target, sink = Target(tiny.target_dir, spec), RecordingSink()
    engine = tiny_engine(tiny.target_dir, spec=spec, drafts=write_tiny_build(tmp_path, target), sink=sink)
    answer, = generate(engine, ask("r", "some text", speculation="3", max_tokens=24))
    assert sink.requests["r"].rows.shape[1] == 3 * 32
    assert_states_match(target, [*engine.codec.encode("some text"), *answer.tokens][:-1], sink.requests["r"].rows)
