"""When a draft ends: by its confidence where that decides, as planned where not."""

from __future__ import annotations

from collections.abc import Sequence

from tide_pipeline.engine.stopping import NO_WORTH, Lengths, Worth
from tide_pipeline.engine.survival import RequestSurvival, Survival


def _members(count: int, rate: float = 0.9) -> list[RequestSurvival | None]:
    return [RequestSurvival(Survival(5, 200, rate)) for _ in range(count)]


def _run(lengths: Lengths, *sure: Sequence[float]) -> int:
    """Passes that were run."""
    for depth, confidences in enumerate(sure, start=1):
        if not lengths.go_on(depth, confidences):
            return depth
    raise AssertionError("it would have gone on")


def test_without_confidence_lengths_are_as_planned() -> None:
    lengths = Lengths([2, 0, 3], [0, 0, 0], [None, None, None], NO_WORTH)
    assert _run(lengths, *[[0.0] * 3] * 5) == 3 and lengths.final == [2, 0, 3]


def test_a_sure_draft_goes_on_to_its_limit_and_beyond_its_plan() -> None:
    lengths = Lengths([1, 1], [5, 3], _members(2), Worth(0.2, (0.1,) * 5))
    assert _run(lengths, *[[0.999] * 2] * 5) == 5 and lengths.final == [5, 3]


def test_a_doubtful_token_is_not_verified_and_ends_the_draft() -> None:
    lengths = Lengths([5, 5], [5, 5], _members(2), Worth(0.3, (0.1,) * 5))
    assert _run(lengths, [0.95, 0.95], [0.95, 0.15], [0.15, 0.99]) == 3 and lengths.final == [2, 1]


def test_the_first_token_is_always_verified() -> None:
    """First-position acceptance, which drift is judged by, must not depend on how sure the draft was."""
    lengths = Lengths([4], [4], _members(1), Worth(0.5, (0.1,) * 5))
    assert _run(lengths, [0.05]) == 1 and lengths.final == [1]


def test_a_pass_that_may_add_less_than_it_costs_is_not_run() -> None:
    dear = Lengths([5], [5], _members(1, 0.5), Worth(0.1, (0.0, 0.6, 0.6, 0.6, 0.6)))
    assert _run(dear, [0.95]) == 1 and dear.final == [1]
    shared = Lengths([5, 5, 5], [5, 5, 5], _members(3, 0.5), Worth(0.1, (0.0, 0.6, 0.6, 0.6, 0.6)))      # three may gain by it
    assert _run(shared, [0.95] * 3, [0.15] * 3) == 2


def test_a_planned_neighbour_keeps_the_passes_running() -> None:
    lengths = Lengths([4, 4], [0, 4], [None, *_members(1)], Worth(0.3, (9.0,) * 5))
    assert _run(lengths, *[[0.5, 0.99]] * 5) == 4 and lengths.final == [4, 4]
