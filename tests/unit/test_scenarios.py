"""Traffic that changes: which domain each scenario asks when, that draws are seeded, and that prompts are not worn out."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tide_pipeline.errors import InvalidRequest
from tide_pipeline.workloads.prompts import Prompt
from tide_pipeline.workloads.scenarios import Scenario, Shape, abrupt, draw, gradual, recurring, scenario_of, steady


def prompts(**sizes: int) -> dict[str, list[Prompt]]:
    return {name: [Prompt(f"{name}{i}", domain=name) for i in range(size)] for name, size in sizes.items()}


def domains(scenario: Scenario, length: int, count: int | None = None, seed: int = 0) -> str:
    """One letter a draw."""
    return "".join(p.domain for p in islice(draw(scenario, prompts(a=3, b=5, c=2), length, seed), length if count is None else count))


def test_steady_traffic_sends_every_prompt_in_order_and_again() -> None:
    found = draw(steady("b"), prompts(b=3), 5)
    assert [p.text for p in islice(found, 7)] == ["b0", "b1", "b2", "b0", "b1", "b2", "b0"]


def test_abrupt_traffic_changes_in_the_middle_and_stays() -> None:
    assert domains(abrupt("a", "b"), 8, 12) == "aaaabbbbbbbb"
    assert domains(abrupt("a", "b", at=0.25), 8) == "aabbbbbb"
    assert domains(abrupt("a", "b"), 1) == "a"


def test_gradual_traffic_rises_in_a_straight_line_and_stays() -> None:
    shares = [gradual("a", "b")(progress)["b"] for progress in (0.0, 0.25, 0.375, 0.5, 0.75, 1.0, 7.0)]
    assert shares == [0.0, 0.0, 0.25, 0.5, 1.0, 1.0, 1.0]
    sent = domains(gradual("a", "b"), 4000, 5000)
    quarters = [sent[start : start + 1000].count("b") for start in range(0, 5000, 1000)]
    assert quarters[0] == 0 and 200 < quarters[1] < 300 and 700 < quarters[2] < 800 and quarters[3:] == [1000, 1000]


def test_recurring_traffic_takes_turns_and_goes_round() -> None:
    assert domains(recurring("abc", cycles=2), 12, 18) == "aabbccaabbccaabbcc"
    assert domains(scenario_of(Shape.RECURRING, ["a", "b"]), 4) == "abab"


def test_draws_depend_on_the_seed_alone() -> None:
    mixed = gradual("a", "b")
    assert domains(mixed, 100) == domains(mixed, 100) != domains(mixed, 100, seed=1)


@given(st.sampled_from([steady("a"), abrupt("a", "b"), gradual("a", "b"), recurring(["a", "b", "c"])]), st.integers(1, 60),
       st.integers(1, 120), st.integers(0, 2**32), st.tuples(*[st.integers(1, 9)] * 3))
def test_no_prompt_comes_twice_before_all_of_its_domain_did(scenario: Scenario, length: int, count: int, seed: int,
                                                            sizes: tuple[int, int, int]) -> None:
    source = prompts(**dict(zip("abc", sizes, strict=True)))
    sent = list(islice(draw(scenario, source, length, seed), count))
    assert len(sent) == count
    for name, found in source.items():
        mine = [p for p in sent if p.domain == name]
        for start in range(0, len(mine), len(found)):
            rounds = mine[start : start + len(found)]
            assert rounds == found[: len(rounds)]


@pytest.mark.parametrize(("shape", "names", "said"), [
    (Shape.STEADY, ["a", "b"], "leave out --to"),
    (Shape.ABRUPT, ["a"], "say to which with --to"),
    (Shape.RECURRING, ["a"], "say to which with --to"),
    (Shape.GRADUAL, ["a", "b", "c"], "one other domain, got b, c"),
    (Shape.RECURRING, ["a", "b", "a"], "a to b to a: name each once"),
])
def test_domains_that_make_no_scenario_are_refused(shape: Shape, names: list[str], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        scenario_of(shape, names)
