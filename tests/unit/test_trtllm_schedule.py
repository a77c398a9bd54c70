"""Draft lengths by batch size: what pays is found, and said in terms that every version understands."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tide_pipeline.engine.costs import StepCosts
from tide_pipeline.engine.trtllm.options import translate_schedule
from tide_pipeline.engine.trtllm.schedule import (
    StepTimes,
    as_schedule,
    best_lengths,
    break_even,
    length_at,
    of_costs,
    rate,
)
from tide_pipeline.serve.front.replicas import Replica, ReplicaSpec, preferred

CHANCES = (0.8, 0.6, 0.45, 0.3)


def memory_bound(batch: int, length: int) -> float:
    """Reading the weights costs 8 ms whatever the batch, every row 0.05 ms, every pass of the draft 0.4 ms."""
    return 8.0 + 0.05 * batch * (1 + length) + 0.4 * length


def test_lengths_fall_with_the_batch_and_never_below_one() -> None:
    lengths = best_lengths(memory_bound, CHANCES, 256)
    assert lengths[1] == 4 and lengths[256] == 1 and sorted(lengths.values(), reverse=True) == list(lengths.values())
    for batch in (1, 7, 40, 100):
        assert lengths[batch] == max(range(1, 5), key=lambda k: rate(memory_bound, CHANCES, batch, k))


def test_a_draft_that_never_pays_still_gets_one() -> None:
    assert set(best_lengths(lambda b, k: 1.0 + 10.0 * k, (0.01, 0.0), 8).values()) == {1}
    assert break_even(lambda b, k: 1.0 + 10.0 * k, (0.01, 0.0), 8) == 0


def test_break_even_is_where_plain_decoding_overtakes() -> None:
    limit = break_even(memory_bound, CHANCES, 1_000)
    pays = [max(rate(memory_bound, CHANCES, b, k) for k in (1, 2, 3, 4)) > rate(memory_bound, CHANCES, b, 0) for b in range(1, 1_001)]
    assert 0 < limit < 1_000 and all(pays[:limit]) and not pays[limit]


@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=40).map(lambda found: sorted(found, reverse=True)))
def test_a_schedule_says_the_same_in_both_directions_of_reading(lengths: list[int]) -> None:
    by_batch = dict(enumerate(lengths, 1))
    schedule, most = as_schedule(by_batch), len(lengths)
    assert [length_at(schedule, b) for b in by_batch] == lengths and max(schedule) == most and length_at(schedule, most + 1) == 0
    up_to, since = (translate_schedule(schedule, meaning, 5, most) for meaning in ("up to", "from"))
    for batch, length in by_batch.items():
        assert next(up_to[key] for key in sorted(up_to) if batch <= key) == length              # NVIDIA's 1.3 and later
        assert since[max(key for key in since if key <= batch)] == length and 1 in since        # 1.2


def test_the_embedded_engines_table_serves_as_costs() -> None:
    costs = StepCosts()
    costs.profile({(b, k, 0): 0.4 * k for b in (1, 8) for k in (1, 2, 3, 4)},
                  {(b, b * n, 0): 8 + 0.05 * b * n for b in (1, 8) for n in (1, 5)})
    assert of_costs(costs)(4, 2) == pytest.approx(memory_bound(4, 2))
    assert best_lengths(of_costs(costs), CHANCES, 8) == best_lengths(memory_bound, CHANCES, 8)


@pytest.fixture
def times() -> StepTimes:
    seen = StepTimes()
    for batch, length in ((1, 4), (2, 4), (8, 3), (16, 2), (40, 1)):
        for _ in range(3):
            seen.observe(batch, length, memory_bound(batch, length))
    return seen


def test_times_that_were_not_seen_follow_from_those_that_were(times: StepTimes) -> None:
    fitted: Callable[[int, int], float] = times.fitted()
    for batch, length in ((4, 4), (20, 1), (30, 3), (16, 2)):
        assert fitted(batch, length) == pytest.approx(memory_bound(batch, length), rel=0.02)
    assert times.table()["b8k3"] == pytest.approx(memory_bound(8, 3), abs=1e-3)


def test_too_few_times_make_no_schedule() -> None:
    times = StepTimes()
    times.observe(1, 3, 9.0)
    with pytest.raises(ValueError, match="serve more"):
        times.fitted()


def replicas(*in_flight: tuple[str, int, int]) -> list[Replica]:
    return [Replica(ReplicaSpec(name, "http://127.0.0.1:1", best_until=limit), ready=True, in_flight=n) for name, limit, n in in_flight]


@pytest.mark.parametrize(("fleet", "expected"), [
    ([("fast", 4, 0), ("plain", 0, 0)], ["fast"]), ([("fast", 4, 3), ("plain", 0, 0)], ["fast"]),
    ([("fast", 4, 4), ("plain", 0, 9)], ["plain"]), ([("fast", 4, 4), ("other", 4, 1), ("plain", 0, 0)], ["other"]),
    ([("fast", 4, 4), ("other", 4, 9)], ["fast", "other"]), ([("a", 0, 5), ("b", 0, 0)], ["a", "b"])])
def test_replicas_that_speculate_come_first_up_to_their_limit(fleet: list[tuple[str, int, int]], expected: list[str]) -> None:
    assert [replica.spec.name for replica in preferred(replicas(*fleet))] == expected
