"""Plans by what pays: survival, the best of all plans, competition for rows, and probes within their budget."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tide_pipeline.config import SpeculationSettings
from tide_pipeline.contracts import StepKind
from tide_pipeline.engine.control import REST_STEPS, Slot, SpeculationController
from tide_pipeline.engine.survival import Calibration, RequestSurvival, Survival

MAX = 5


def _controller(draft_ms: float = 1.2, row_ms: float = 0.5, plain_ms: float = 8.0, **values: object) -> SpeculationController:
    """Costs: `draft_ms` a depth, growing with the members, and `row_ms` for every row that is verified."""
    control = SpeculationController(SpeculationSettings(**values), MAX)      # type: ignore[arg-type]
    control.costs.profile({(m, d, 64): draft_ms * d * (1 + 0.1 * m) for m in (1, 4, 8) for d in range(1, MAX + 1)},
                          {(b, b * w, 64): plain_ms + row_ms * b * w for b in (1, 4, 8) for w in range(1, MAX + 2)})
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
    assert survival.rates() == pytest.approx([0.7, 0.7, 0.7])
    for _ in range(2_000):
        survival.observe(3, 1)                                # the first accepted, the second refused, the third never tried
    assert survival.rates()[:2] == pytest.approx([1.0, 0.0], abs=0.05)


def test_a_depth_that_was_never_tried_is_expected_to_go_on_as_the_one_before() -> None:
    """A fixed prior was lower than what the tried depths showed, so that deeper ones were never tried."""
    survival = Survival(5, 200, 0.7)
    for _ in range(2_000):
        survival.observe(2, 2)
    assert survival.rates() == pytest.approx([1.0] * 5, abs=0.02)


def test_a_confidence_is_worth_what_tokens_with_it_were() -> None:
    calibration = Calibration()
    assert calibration.chance(0.85) == pytest.approx(0.85) and calibration.chance(1.0) > calibration.chance(0.97) > calibration.chance(0.0)
    for i in range(2_000):
        calibration.observe(0.97, i % 2 == 0)                 # a draft that is far too sure of itself
    assert calibration.chance(0.98) == pytest.approx(0.5, abs=0.02) and calibration.chance(0.85) == pytest.approx(0.85)


def test_survival_ignores_positions_beyond_its_depth() -> None:
    survival = Survival(2, 200, 0.7)
    survival.observe(5, 5)                                    # a request fixed a draft length the controller does not use
    assert len(survival.rates()) == 2


def test_survival_forgets() -> None:
    survival = _workload(1.0)
    for _ in range(600):
        survival.observe(5, 0)
    assert survival.rates()[0] < 0.08


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
    assert workload.rates()[0] < 0.1 and RequestSurvival(workload).chances()[0] < 0.1


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


# --- rest, and confidence -----------------------------------------------------------------------------------------

def test_a_plan_to_draft_nothing_stands_until_somebody_joins_or_leaves() -> None:
    control = _controller()
    assert control.plan([_slot(0.01)]).lengths == [0]
    assert [control.rests() for _ in range(REST_STEPS + 2)] == [True] * REST_STEPS + [False, False]
    control.plan([_slot(0.01)])
    control.changed()
    assert not control.rests()
    control.plan([_slot(0.99)])
    assert not control.rests()
    control.plan([_slot(0.01), _slot(0.01, fixed=3)])
    assert not control.rests()                                # a client asked for drafts


def test_confidence_decides_for_greedy_requests_that_the_plan_drafts_for() -> None:
    slots = [_slot(0.95), _slot(0.95, cap=2), _slot(0.95, fixed=3), dataclasses.replace(_slot(0.95), is_greedy=False), Slot(None, 9)]
    plan = _controller(0.2, 0.1).plan(slots)
    assert plan.limits == [MAX, 2, 0, 0, 0] and len(plan.worth.passes) == MAX
    assert 0 < plan.worth.row < 0.2 and plan.worth.row > _controller(0.2, 0.05).plan(slots).worth.row
    assert not any(_controller(0.2, 0.1, early_stop=False).plan(slots).limits)


# --- probes -------------------------------------------------------------------------------------------------------

def test_probes_keep_within_their_share_of_time_and_find_recovery() -> None:
    """Off, because nothing is accepted; the text changes back; only probes can tell, and they take at most 0.5 % and one probe."""
    control, probe_ms = _controller(survival_window=50), 9.0
    slot = Slot(RequestSurvival(_workload(0.02)), 100, waiting=20)
    assert slot.survival is not None
    steps = plain_ms = 0.0
    while (plan := control.plan([slot])).depth == 0 or plan.kind is StepKind.PROBE:
        steps += 1
        assert steps < 200_000, "speculation never came back"
        slot.survival.observe(plan.depth, plan.depth)         # accepted again
        if plan.depth:
            control.spend(probe_ms)                           # dearer than was expected: the next one waits for longer
        else:
            plain_ms += 8.5
            control.earn(8.5)
        assert control.spent_ms <= control.settings.probe_share * plain_ms + probe_ms
    assert control.spent_ms > 0


def test_a_probe_is_of_one_request_and_workloads_take_turns() -> None:
    control = _controller()
    slots = [Slot(_slot(0.01).survival, 100, waiting=waiting) for waiting in (50, 7)]
    slots += [Slot(RequestSurvival(slots[0].survival.workload), 100, waiting=3)]      # type: ignore[union-attr]
    control.earn(1e9)
    probed = [control.plan(slots).lengths for _ in range(4)]
    assert probed == [[0, 0, 3], [0, 3, 0]] * 2               # two workloads, each by its request that is cheapest to catch up


def test_without_credit_nothing_is_probed() -> None:
    control = _controller()
    assert [control.plan([_slot(0.01)]).depth for _ in range(50)] == [0] * 50
