"""Draft lengths by batch size: what pays is found, and said in terms that every version understands."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tide_pipeline.engine.trtllm.options import translate_schedule
from tide_pipeline.engine.trtllm.schedule import (
    StepCell,
    StepTimes,
    as_schedule,
    best_lengths,
    break_even,
    fit_steps,
    length_at,
    rate,
)
from tide_pipeline.engine.trtllm.schedule_file import FILE, fitting, read_schedule, write_schedule
from tide_pipeline.errors import BuildError
from tide_pipeline.serve.front.replicas import Replica, ReplicaSpec, preferred

CHANCES = (0.8, 0.6, 0.45, 0.3)


def memory_bound(batch: int, length: int) -> float:
    """Reading the weights costs 8 ms whatever the batch, every row 0.05 ms, every pass of the draft 0.4 ms."""
    return 8.0 + 0.05 * batch * (1 + length) + 0.4 * length


def test_lengths_fall_with_the_batch_and_never_below_one() -> None:
    lengths = best_lengths(memory_bound, CHANCES, range(1, 257))
    assert lengths[1] == 4 and lengths[256] == 1 and sorted(lengths.values(), reverse=True) == list(lengths.values())
    for batch in (1, 7, 40, 100):
        assert lengths[batch] == max(range(1, 5), key=lambda k: rate(memory_bound, CHANCES, batch, k))


def test_a_draft_that_never_pays_still_gets_one() -> None:
    assert set(best_lengths(lambda b, k: 1.0 + 10.0 * k, (0.01, 0.0), range(1, 9)).values()) == {1}
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


def cells(*pairs: tuple[int, int], steps: float = 300.0) -> list[StepCell]:
    return [StepCell(batch, length, memory_bound(batch, length), steps) for batch, length in pairs]


SERVED = ((1, 4), (2, 4), (8, 3), (16, 2), (40, 1))


def test_times_that_were_not_seen_follow_from_those_that_were() -> None:
    fitted = fit_steps(cells(*SERVED))
    for batch, length in ((4, 4), (20, 1), (30, 3), (16, 2)):
        assert fitted(batch, length) == pytest.approx(memory_bound(batch, length), rel=0.02)


def test_a_cell_goes_by_itself_the_more_steps_it_has() -> None:
    """A size that is cheaper than the line says, as one with a graph of its own may be."""
    line, cheap = fit_steps(cells(*SERVED)), memory_bound(8, 3) / 2
    few, many = (fit_steps([*cells(*SERVED[:2], *SERVED[3:], steps=1e6), StepCell(8, 3, cheap, steps)])(8, 3) for steps in (1.0, 1e4))
    assert few == pytest.approx(line(8, 3), rel=0.03) and many == pytest.approx(cheap, rel=0.03)


def test_noise_never_makes_a_longer_draft_or_a_larger_batch_cheaper() -> None:
    measured = ((1, 4, 9.0), (2, 1, 14.0), (16, 4, 12.0), (16, 1, 15.0), (64, 2, 8.0))
    wild = [StepCell(batch, length, ms, 100.0) for batch, length, ms in measured]
    fitted = fit_steps(wild)
    assert fitted(5, 1) <= fitted(5, 2) <= fitted(5, 4) and fitted(3, 3) <= fitted(30, 3) <= fitted(300, 3)


@pytest.mark.parametrize("pairs", [((1, 3),), ((1, 3), (2, 3), (4, 3), (8, 3), (16, 3)), ((1, 3), (2, 2), (4, 1))])
def test_too_few_times_make_no_schedule(pairs: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match="serve more"):
        fit_steps(cells(*pairs))


def test_times_of_passes_are_averages_without_their_outliers() -> None:
    seen = StepTimes()
    for ms in (10.0, 10.0, 1000.0):
        seen.observe(8, 3, ms)
    assert seen.table() == {"b8k3": 10.5}


def test_a_schedule_in_a_build_comes_back_and_a_build_without_one_has_none(tmp_path: Path) -> None:
    write_schedule(tmp_path, {4: 3, 16: 1}, {"log": "acceptance"})
    assert read_schedule(tmp_path) == {4: 3, 16: 1} and read_schedule(tmp_path / "other") == {}
    for text in ("{", "[]", '{"schedule": {"a": 1}}', '{"schedule": 3}'):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(BuildError, match=r"schedule\.json can't be read .* `tide build`"):
            read_schedule(tmp_path)


@pytest.mark.parametrize(("longest", "most", "expected"), [
    (3, 16, {4: 3, 8: 2, 16: 1}), (2, 16, {8: 2, 16: 1}), (3, 64, {4: 3, 8: 2, 64: 1}), (3, 6, {4: 3, 6: 2}), (3, 2, {2: 3}),
    (3, 8, {4: 3, 8: 2})])
def test_a_server_with_other_limits_takes_what_it_can(longest: int, most: int, expected: dict[int, int]) -> None:
    found = fitting({4: 3, 8: 2, 16: 1}, longest, most)
    assert found == expected and translate_schedule(found, "up to", longest, most) == expected and fitting({}, longest, most) == {}


def replicas(*in_flight: tuple[str, int, int]) -> list[Replica]:
    return [Replica(ReplicaSpec(name, "http://127.0.0.1:1", best_until=limit), ready=True, in_flight=n) for name, limit, n in in_flight]


@pytest.mark.parametrize(("fleet", "expected"), [
    ([("fast", 4, 0), ("plain", 0, 0)], ["fast"]), ([("fast", 4, 3), ("plain", 0, 0)], ["fast"]),
    ([("fast", 4, 4), ("plain", 0, 9)], ["plain"]), ([("fast", 4, 4), ("other", 4, 1), ("plain", 0, 0)], ["other"]),
    ([("fast", 4, 4), ("other", 4, 9)], ["fast", "other"]), ([("a", 0, 5), ("b", 0, 0)], ["a", "b"])])
def test_replicas_that_speculate_come_first_up_to_their_limit(fleet: list[tuple[str, int, int]], expected: list[str]) -> None:
    assert [replica.spec.name for replica in preferred(replicas(*fleet))] == expected
