"""Step costs: interpolation, the machine's load, cells that stay comparable."""

from __future__ import annotations

import pytest

from tide_pipeline.engine.costs import StepCosts, interpolate
from tide_pipeline.engine.profile import monotone


def _costs() -> StepCosts:
    costs = StepCosts()
    costs.profile({(m, d, c): (1.0 if m == 1 else 2.0) * d * c / 64 for m in (1, 4) for d in range(1, 6) for c in (64, 512)},
                  {(b, b * w, c): 8.0 + b * w + b * (c - 64) / 64 for b in (1, 4) for w in range(1, 7) for c in (64, 512)})
    return costs


def test_interpolation_is_straight_between_and_beyond_what_is_known() -> None:
    known = {2: 10.0, 4: 14.0, 8: 30.0}
    assert [interpolate(known, at) for at in (1, 2, 3, 4, 6, 8, 10)] == [10.0, 10.0, 12.0, 14.0, 22.0, 30.0, 38.0]
    assert interpolate({3: 5.0}, 9) == 5.0 and interpolate({}, 1) == 0.0


def test_costs_of_cells_that_were_never_measured() -> None:
    costs = _costs()
    assert costs.verify_ms(4, 10) == pytest.approx(18.0) and costs.verify_ms(2, 5) == pytest.approx(13.0)
    assert costs.draft_ms(2, 3) == pytest.approx(4.0) and costs.draft_ms(8, 0) == 0.0


def test_a_profiled_cell_that_a_larger_one_beats_was_disturbed() -> None:
    cells = {(1, 1, 64): 7.6, (1, 2, 64): 6.7, (1, 3, 64): 7.0, (2, 2, 64): 6.9, (1, 1, 512): 6.5, (1, 2, 512): 9.0}
    assert monotone(cells) == {(1, 1, 64): 6.5, (1, 2, 64): 6.7, (1, 3, 64): 7.0, (2, 2, 64): 6.9, (1, 1, 512): 6.5, (1, 2, 512): 9.0}


def test_a_longer_context_costs_more() -> None:
    """In a straight line between two contexts and beyond them, told apart by 32 positions."""
    costs = _costs()
    assert costs.verify_ms(4, 8, 64) == costs.verify_ms(4, 8) == pytest.approx(16.0)
    assert costs.verify_ms(4, 8, 256) == costs.verify_ms(4, 8, 270) == pytest.approx(28.0)
    assert costs.draft_ms(1, 2, 512) == pytest.approx(16.0) and costs.verify_ms(1, 1, 1024) == pytest.approx(24.0)


def test_what_a_long_context_teaches_is_not_told_to_a_short_one() -> None:
    costs = _costs()
    for _ in range(4_000):
        costs.observe(1, 1, 9.0, 1, 0, 0.0, 40)
        costs.observe(1, 4, 32.0, 1, 3, 24.0, 512)                    # verification was profiled as 19
    assert costs.verify_ms(1, 4, 512) / costs.verify_ms(1, 1, 40) > 1.2 * 19 / 9
    assert costs.verify_ms(1, 4, 40) == pytest.approx(12.0)


def test_a_busy_machine_is_load_and_no_cell_moves_against_another() -> None:
    costs = _costs()
    before = costs.table()
    for _ in range(500):
        costs.observe(1, 4, 1.7 * 12.0, 1, 3, 1.7 * 3.0)              # only one cell is visited, all steps take 1.7 times as long
    assert costs.load == pytest.approx(1.7, rel=0.05)
    after = costs.table()
    assert after == pytest.approx(before, rel=0.04)


def test_a_cell_follows_what_it_costs_beside_the_others() -> None:
    costs = _costs()
    for _ in range(4_000):
        costs.observe(1, 1, 9.0, 1, 0, 0.0)
        costs.observe(1, 4, 18.0, 1, 3, 3.0)                          # verification of 4 rows was profiled as 12
    assert costs.verify_ms(1, 4) / costs.verify_ms(1, 1) == pytest.approx(2.0, rel=0.1)


def test_an_outlier_hardly_counts() -> None:
    costs = _costs()
    costs.observe(1, 1, 9_000.0, 1, 0, 0.0)
    assert costs.load == pytest.approx(1.25) and costs.verify_ms(1, 1) < 9.1


def test_without_a_profile_the_first_steps_are_taken_as_measured() -> None:
    costs = StepCosts()
    costs.observe(1, 1, 9.0, 1, 0, 0.0)
    costs.observe(1, 4, 12.0, 1, 3, 3.0)
    costs.is_profiled = True
    assert costs.verify_ms(1, 1) == 9.0 and costs.verify_ms(1, 2) == 10.0 and costs.draft_ms(1, 3) == 3.0
