"""Looking again inside one tick, with a clock of its own."""

from __future__ import annotations

import pytest

from tide_pipeline.defs.linger import AGAIN_S, linger
from tide_pipeline.errors import LakeError


class Clock:
    """Time passes in `sleep` alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("tide_pipeline.defs.linger.time", self)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(("for_s", "looks", "took_s"), [(0.0, 1, 0.0), (0.4, 1, 0.0), (4.0, 6, 4.0)])
def test_it_looks_when_something_was_written_and_ends_in_time(monkeypatch: pytest.MonkeyPatch, for_s: float, looks: int,
                                                              took_s: float) -> None:
    clock, seen = Clock(monkeypatch), list[float]()

    def look() -> float:
        seen.append(clock.now)
        return clock.now

    found = linger(look, lambda at: True, lambda: clock.now // 1.0, for_s)             # a shard each second
    assert len(seen) == looks and found == seen[-1] and clock.now - 100.0 == took_s


def test_it_ends_with_what_it_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert linger(lambda: clock.now, lambda at: at < 101.0, lambda: clock.now, 4.0) == 101.0
    assert linger(lambda: clock.now, lambda at: False, not_asked, 4.0) == 101.0 and clock.now == 101.0


def test_what_is_written_while_it_looks_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, looks = Clock(monkeypatch), list[float]()

    def look() -> int:
        looks.append(clock.now)
        return len(looks)

    assert linger(look, lambda seen: seen < 2, lambda: "a shard of the first look's time", 4.0) == 2
    assert looks == [100.0, 100.0 + AGAIN_S]


@pytest.mark.parametrize("fails", ["look", "written"])
def test_a_later_look_that_fails_loses_nothing_and_a_first_one_is_told(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    clock = Clock(monkeypatch)

    def away(what: str) -> float:
        if what == fails and clock.now > 100.0:
            raise LakeError("away")
        return clock.now

    assert linger(lambda: away("look"), lambda at: True, lambda: away("written"), 4.0) == 100.0
    if fails == "look":
        with pytest.raises(LakeError):
            linger(lambda: away("look"), lambda at: True, lambda: 0, 4.0)


def not_asked() -> object:
    raise AssertionError("nothing is near: the lake is not listed")
