"""Plans by what pays: survival, the best of all plans, competition for rows, and probes within their budget."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tide_pipeline.config import SpeculationSettings
from tide_pipeline.contracts import StepKind
from tide_pipeline.engine.control import RequestSurvival, Slot, SpeculationController, Survival

MAX = 5


def _controller(draft_ms: float = 1.2, row_ms: float = 0.5, plain_ms: float = 8.0, **values: object) -> SpeculationController:
    """Costs: `draft_ms` a depth, growing with the members, and `row_ms` for every row that is verified."""
    control = SpeculationController(SpeculationSettings(**values), MAX)      # type: ignore[arg-type]
    control.costs.profile({(m, d): draft_ms * d * (1 + 0.1 * m) for m in (1, 4, 8) for d in range(1, MAX + 1)},
                          {(b, b * w): plain_ms + row_ms * b * w for b in (1, 4, 8) for w in range(1, MAX + 2)})
    return control


def _workload(rate: float, steps: int = 4_000) -> Survival:
    """Worn in at one acceptance rate for every position."""
    survival, credit = Survival(MAX, 200, 0.7), [0.0] * MAX
    for _ in range(steps):
        accepted = 0
        for i in range(MAX):
            credit[i] += rate
            if credit[i] < 1.0:
                break
            credit[i] -= 1.0
            accepted += 1
        survival.observe(MAX, accepted)
    return survival


def _slot(rate: float, cap: int = 100, fixed: int | None = None) -> Slot:
    return Slot(RequestSurvival(_workload(rate)), cap, fixed)


def _rate(control: SpeculationController, slots: Sequence[Slot], lengths: Sequence[int]) -> float:
    """Expected tokens a ms of a plan."""
    members = sum(slot.survival is not None for slot in slots)
    tokens = len(slots) + sum(sum(slot.survival.chances()[:k]) for slot, k in zip(slots, lengths, strict=True) if slot.survival)
    return tokens / (control.costs.draft_ms(members, max(lengths)) + control.costs.verify_ms(len(slots), len(slots) + sum(lengths)))


# --- survival -----------------------------------------------------------------------------------------------------

def test_survival_starts_at_the_prior_and_learns_each_position() -> None:
    survival = Survival(3, 200, 0.7)
    assert survival.rates() == pytest.approx([0.7, 0.665, 0.63175])
    for _ in range(2_000):
        survival.observe(3, 1)                                # the first accepted, the second refused, the third never tried
    assert survival.rates() == pytest.approx([1.0, 0.0, 0.63175], abs=0.01)


def test_survival_ignores_positions_beyond_its_depth() -> None:
    survival = Survival(2, 200, 0.7)
    survival.observe(5, 5)                                    # a request fixed a draft length the controller does not use
    assert len(survival.rates()) == 2


def test_survival_forgets() -> None:
    survival = _workload(1.0)
    for _ in range(600):
        survival.observe(5, 0)
    assert survival.rates()[0] < 0.06


def test_a_request_begins_as_its_workload_learns_itself_and_is_forgotten() -> None:
    workload = _workload(0.6)
    request = RequestSurvival(workload)
    alpha = workload.rates()[0]
    assert alpha == pytest.approx(0.6, abs=0.02)
    assert 1 + sum(request.chances()[:3]) == pytest.approx((1 - alpha**4) / (1 - alpha), rel=0.03)      # equation 2 of the paper
    for _ in range(40):
        request.observe(5, 5)
    assert request.chances()[0] > 0.9
    for _ in range(400):
        request.observe(0, 0)                                 # nothing was drafted for it
    assert request.chances()[0] == pytest.approx(workload.rates()[0], abs=0.01)


def test_what_a_request_shows_counts_for_its_workload() -> None:
    workload = Survival(MAX, 50, 0.7)
    request = RequestSurvival(workload)
    for _ in range(200):
        request.observe(3, 0)
    assert workload.rates()[0] < 0.05 and RequestSurvival(workload).chances()[0] < 0.05


# --- plans --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 0.8, 0.97])
def test_alone_the_depth_with_the_highest_rate_is_taken(rate: float) -> None:
    control, slots = _controller(), [_slot(rate)]
    gain = {k: _rate(control, slots, [k]) for k in range(MAX + 1)}
    gain[0] *= 1.0 + control.settings.switch_margin
    assert control.plan(slots).lengths == [max(gain, key=gain.__getitem__)]


@settings(max_examples=60, deadline=None)
@given(rates=st.lists(st.floats(0.02, 0.98), min_size=2, max_size=3), draft_ms=st.floats(0.1, 4.0), row_ms=st.floats(0.01, 2.0))
def test_no_other_plan_is_better(rates: list[float], draft_ms: float, row_ms: float) -> None:
    """Against every combination of lengths, on costs that rise evenly with the rows."""
    control = _controller(draft_ms, row_ms)
    slots = [Slot(RequestSurvival(_workload(rate, 300)), 100) for rate in rates]
    best = max(_rate(control, slots, lengths) for lengths in itertools.product(range(MAX + 1), repeat=len(slots)))
    plan = control.plan(slots)
    assert _rate(control, slots, plan.lengths) >= best / (1.0 + control.settings.switch_margin) - 1e-9


def test_the_extremes() -> None:
    control = _controller(draft_ms=0.3, row_ms=0.05)
    assert control.plan([_slot(0.99)]).lengths == [5]
    assert control.plan([_slot(0.01)]).lengths == [0]
    assert control.plan([Slot(None, 9)]).lengths == [0]       # nobody may draft
    assert control.plan([]).lengths == []


def test_requests_compete_for_rows() -> None:
    """Where rows are dear, a request that is seldom right gets fewer of them than one that mostly is."""
    good, bad = control_lengths = _controller(draft_ms=0.2, row_ms=2.0).plan([_slot(0.95), _slot(0.3)]).lengths
    assert good > bad, control_lengths


def test_lengths_that_clients_fix_and_caps_are_kept() -> None:
    control = _controller(draft_ms=0.1, row_ms=0.01)
    plan = control.plan([_slot(0.01, fixed=4), _slot(0.01, cap=2, fixed=4), _slot(0.99, cap=1), _slot(0.99), Slot(None, 9)])
    assert plan.lengths == [4, 2, 1, 5, 0] and plan.depth == 5


def test_the_controller_never_passes_its_own_limit() -> None:
    assert _controller(draft_ms=0.01, row_ms=0.01, max_draft_length=2).plan([_slot(0.99)]).lengths == [2]


def test_without_a_profile_every_depth_is_tried() -> None:
    """An engine that got its first draft while serving has no profile: it must not stay at 0 for ever."""
    control, slot, seen = SpeculationController(SpeculationSettings(), MAX), _slot(0.9), []
    for _ in range(12):
        (k,) = control.plan([slot]).lengths
        seen.append(k)
        control.costs.observe(1, 1 + k, 9.0 + 0.5 * k, 1, k, 1.0 * k)
    assert seen == [0, 1, 2, 3, 4, 5] * 2
    assert control.plan([slot]).lengths[0] > 0


def test_estimates_are_per_workload_and_draft_and_die_with_the_draft() -> None:
    control = _controller()
    control.survival("a", "v1").observe(1, 0)
    assert control.survival("a", "v1").rates() != control.survival("b", "v1").rates()
    assert control.survival("a", "v2").rates() == control.survival("b", "v1").rates()
    assert control.survival("a", "v1", is_sampled=True).rates() == control.survival("b", "v1").rates()
    control.forget({"v2"})
    assert control.survival("a", "v1").rates() == control.survival("b", "v1").rates()


# --- probes -------------------------------------------------------------------------------------------------------

def test_probes_keep_within_their_share_of_time_and_find_recovery() -> None:
    """Off, because nothing is accepted; the text changes back; only probes can tell, and they take at most 0.5 %."""
    control = _controller(survival_window=50)
    workload = _workload(0.02)
    slot = Slot(RequestSurvival(workload), 100)
    steps = plain_ms = 0.0
    while (plan := control.plan([slot], catch_up_ms=3.0)).depth == 0 or plan.kind is StepKind.PROBE:
        steps += 1
        assert steps < 200_000, "speculation never came back"
        assert slot.survival is not None
        slot.survival.observe(plan.depth, plan.depth)         # accepted again
        if plan.depth == 0:
            plain_ms += 8.5
            control.earn(8.5)
        assert control.probe_ms <= control.settings.probe_share * plain_ms + 1e-6
    assert control.probe_ms > 0
