"""Greedy equivalence, token by token: what plain decoding would not have said is found, wherever it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import ask, generate, tiny_engine, tiny_spec
from tide_pipeline.engine.text import TextCodec
from tide_pipeline.gate.bench import Equivalence, check_equivalence
from tide_pipeline.models.target import Target

PROMPT, TOKENS = "some words to begin with", 12


@pytest.fixture(scope="module")
def said(tiny_dir: Path) -> tuple[list[int], list[int]]:
    """A prompt, and what plain decoding says to it."""
    engine = tiny_engine(tiny_dir, spec=tiny_spec())
    (answer,) = generate(engine, ask("a", PROMPT, max_tokens=TOKENS, ignore_eos=True, speculation="off"))
    engine.close()
    return TextCodec(tiny_dir).encode(PROMPT), answer.tokens


def test_plain_decoding_is_its_own_equal_by_both_ways(tiny_target: Target, said: tuple[list[int], list[int]]) -> None:
    prompt, output = said
    by_pass, by_comparison = Equivalence(), Equivalence()
    check_equivalence(tiny_target, prompt, output, 1e-4, by_pass)
    check_equivalence(tiny_target, prompt, output, 1e-4, by_comparison, plain=output)
    assert by_pass == by_comparison == Equivalence(compared=TOKENS)


@pytest.mark.parametrize("at", [0, 5, TOKENS - 1])
def test_one_wrong_token_is_found_where_it_stands(tiny_target: Target, said: tuple[list[int], list[int]], at: int) -> None:
    """It is a mismatch for certain; what comes after may well be right, given it."""
    prompt, output = said
    wrong = [*output[:at], (output[at] + 1) % tiny_target.shape.vocab_size, *output[at + 1 :]]
    found = Equivalence()
    check_equivalence(tiny_target, prompt, wrong, 1e-4, found, plain=output)
    assert found.compared == TOKENS and found.mismatches >= 1
    if at:
        short = Equivalence()
        check_equivalence(tiny_target, prompt, wrong[:at], 1e-4, short, plain=output[:at])
        assert short.mismatches == 0
