"""Greedy equivalence, token by token: what plain decoding would not have said is found, wherever it stands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers import ask, generate, plain_pass, tiny_engine, tiny_spec
from tide_pipeline.engine.text import TextCodec
from tide_pipeline.gate.equivalence import ROUNDING, Equivalence, check_equivalence, tolerance
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
        check_equivalence(tiny_target, prompt, wrong[:at], 1e-4, short)
        assert short.mismatches == 0


def test_in_bf16_rounding_is_a_tie_and_more_is_not(tiny_dir: Path) -> None:
    """A target in 16 bits, decoded token by token: passes of another width round otherwise, by more than 1e-4."""
    target = Target(tiny_dir, tiny_spec(), dtype=torch.bfloat16)
    prompt = TextCodec(tiny_dir).encode(PROMPT)
    output, cache = list[int](), target.new_cache(1, len(prompt) + TOKENS)
    tokens, at = prompt, 0
    for _ in range(TOKENS):
        _, final = target.forward(torch.tensor([tokens]), torch.arange(at, at + len(tokens)).unsqueeze(0), cache)
        output.append(int(target.logits(final[0, -1:]).argmax()))
        at, tokens = at + len(tokens), output[-1:]
    found = Equivalence()
    check_equivalence(target, prompt, output, 1e-4, found)
    assert (found.compared, found.mismatches) == (TOKENS, 0)

    text = torch.randint(1, target.shape.vocab_size, (90,), generator=torch.Generator().manual_seed(0)).tolist()
    best_T2, chosen_T2 = plain_pass(target, text)[2].float().topk(2)
    gaps_T = best_T2[:, 0] - best_T2[:, 1]
    near = next(t for t in range(90) if 1e-4 < gaps_T[t] <= ROUNDING * best_T2[t, 0])
    far = next(t for t in range(90) if gaps_T[t] > 4 * ROUNDING * best_T2[t, 0])
    for at, wanted in ((near, Equivalence(1, ties=1)), (far, Equivalence(1, mismatches=1))):
        judged = Equivalence()
        check_equivalence(target, text[: at + 1], [int(chosen_T2[at, 1])], 1e-4, judged)
        assert judged == wanted


def test_of_fp32_epsilon_is_what_the_settings_say_whatever_the_logits_are() -> None:
    logits_NV = torch.tensor([[1000.0, 1.0], [2.0, 1.0]])
    assert tolerance(logits_NV, 1e-4).tolist() == pytest.approx([1e-4, 1e-4])
    assert tolerance(logits_NV.bfloat16(), 1e-4).tolist() == [1000.0 * ROUNDING, 2.0 * ROUNDING]
