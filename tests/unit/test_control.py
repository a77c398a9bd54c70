"""Draft length by what pays: step times, survival, the choice, and probes within their budget."""

from __future__ import annotations

import itertools

import pytest

from tide_pipeline.config import SpeculationSettings
from tide_pipeline.engine.control import SpeculationController, StepTimes, Survival


def _controller(ms: dict[tuple[int, int], float], **settings: object) -> SpeculationController:
    control = SpeculationController(SpeculationSettings(**settings), 5)      # type: ignore[arg-type]
    for (batch, depth), value in ms.items():
        control.times.record(batch, depth, value)
    return control


def _survival(rate: float, depth: int = 5, steps: int = 4_000) -> Survival:
    """Worn in at one acceptance rate for every position."""
    survival, credit = Survival(depth, 200, 0.7), [0.0] * depth
    for _ in range(steps):
        accepted = 0
        for i in range(depth):
            credit[i] += rate
            if credit[i] < 1.0:
                break
            credit[i] -= 1.0
            accepted += 1
        survival.observe(depth, accepted)
    return survival


# --- step times ---------------------------------------------------------------------------------------------------

def test_times_are_interpolated_between_batches_and_held_at_the_ends() -> None:
    times = StepTimes(5)
    assert times.ms(1, 0) is None
    times.record(2, 0, 10.0)
    times.record(6, 0, 30.0)
    times.record(4, 1, 7.0)
    assert [times.ms(b, 0) for b in (1, 2, 3, 4, 6, 9)] == [10.0, 10.0, 15.0, 20.0, 30.0, 30.0]
    assert times.ms(1, 1) == 7.0 and times.ms(8, 1) == 7.0 and times.ms(1, 2) is None
    assert times.table() == {"b2k0": 10.0, "b4k1": 7.0, "b6k0": 30.0}


def test_times_follow_slowly_and_outliers_hardly_move_them() -> None:
    times = StepTimes(5)
    times.record(1, 0, 10.0)
    times.record(1, 0, 1_000.0)
    assert times.ms(1, 0) == pytest.approx(10.5)             # clamped to twice what is known, folded in with weight 0.05
    times.record(1, 0, 0.0)
    assert times.ms(1, 0) == pytest.approx(10.5 * 0.975)
    for _ in range(300):
        times.record(1, 0, 12.0)
    assert times.ms(1, 0) == pytest.approx(12.0, rel=1e-3)


# --- survival -----------------------------------------------------------------------------------------------------

def test_survival_starts_at_the_prior_and_learns_each_position() -> None:
    survival = Survival(3, 200, 0.7)
    assert survival.rates() == pytest.approx([0.7, 0.665, 0.63175])
    for _ in range(2_000):
        survival.observe(3, 1)                                # the first accepted, the second refused, the third never tried
    assert survival.rates() == pytest.approx([1.0, 0.0, 0.63175], abs=0.01)
    assert survival.expected_tokens() == pytest.approx([1.0, 2.0, 2.0, 2.0], abs=0.02)


def test_survival_ignores_positions_beyond_its_depth() -> None:
    survival = Survival(2, 200, 0.7)
    survival.observe(5, 5)                                    # a request fixed a draft length the controller does not use
    assert len(survival.rates()) == 2


def test_survival_forgets() -> None:
    survival = _survival(1.0)
    for _ in range(600):
        survival.observe(5, 0)
    assert survival.rates()[0] < 0.06


def test_expected_tokens_are_equation_2_at_equal_rates() -> None:
    alpha = _survival(0.6).rates()[0]
    assert alpha == pytest.approx(0.6, abs=0.02)
    assert _survival(0.6).expected_tokens()[3] == pytest.approx((1 - alpha**4) / (1 - alpha), rel=0.03)


# --- the choice ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 0.8, 0.97])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_choice_maximises_expected_tokens_per_second(rate: float, batch: int) -> None:
    control = _controller({(b, k): 8.0 + b + 1.2 * k * (1 + 0.4 * b) for b, k in itertools.product((1, 4), range(6))})
    survival = _survival(rate)
    e = survival.expected_tokens()
    gain = {k: batch * e[k] / control.times.ms(batch, k) for k in range(6)}
    gain[0] *= 1.0 + control.settings.switch_margin
    assert control.choose(batch, [survival] * batch) == max(gain, key=gain.__getitem__)


def test_the_extremes() -> None:
    control = _controller({(1, k): 10.0 + k for k in range(6)})
    assert control.choose(1, [_survival(0.99)]) == 5
    assert control.choose(1, [_survival(0.01)]) == 0
    assert control.choose(1, []) == 0                         # nobody may draft


def test_requests_that_do_not_draft_count_as_one_token_each() -> None:
    """What pays for one alone need not pay when seven others wait for it."""
    control = _controller({(b, k): 10.0 + 4.0 * k for b in (1, 8) for k in range(6)})
    good = _survival(0.9)
    assert control.choose(1, [good]) > 0 and control.choose(8, [good]) == 0


def test_the_controller_never_passes_its_own_limit() -> None:
    control = _controller({(1, k): 10.0 for k in range(6)}, max_draft_length=2)
    assert control.choose(1, [_survival(0.99)]) == 2


def test_a_depth_without_a_time_is_tried_once() -> None:
    """An engine that got its first draft while serving has no profile: it must not stay at 0 for ever."""
    control, survival, seen = _controller({}), _survival(0.9), []
    for _ in range(6):
        seen.append(control.choose(1, [survival]))
        control.times.record(1, seen[-1], 10.0 + seen[-1])
    assert seen == [0, 1, 2, 3, 4, 5]
    assert control.choose(1, [survival]) > 0


def test_estimates_are_per_workload_and_draft_and_die_with_the_draft() -> None:
    control = _controller({})
    control.survival("a", "v1").observe(1, 0)
    assert control.survival("a", "v1").rates() != control.survival("b", "v1").rates()
    assert control.survival("a", "v2").rates() == control.survival("b", "v1").rates()
    control.forget({"v2"})
    assert control.survival("a", "v1").rates() == control.survival("b", "v1").rates()


# --- probes -------------------------------------------------------------------------------------------------------

def test_probes_keep_within_their_share_of_time_and_find_recovery() -> None:
    """Off, because nothing is accepted; the text changes back; only probes can tell, and they take at most 0.5 %."""
    control = _controller({(1, k): 10.0 + 2.0 * k for k in range(6)}, survival_window=50)
    survival = _survival(0.02)
    assert control.choose(1, [survival]) == 0
    steps = plain_ms = 0.0
    while control.choose(1, [survival]) == 0:
        steps += 1
        assert steps < 200_000, "speculation never came back"
        if control.probe_due(1, catch_up_ms=3.0):
            survival.observe(3, 3)                            # accepted again
        plain_ms += 10.0
        control.earn(10.0)
        assert control.probe_ms <= control.settings.probe_share * plain_ms
    assert control.probe_ms > 0


def test_a_probe_needs_step_times() -> None:
    control = _controller({(1, 0): 10.0})
    control.earn(1e9)
    assert not control.probe_due(1, 0.0)
