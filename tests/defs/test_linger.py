"""Looking again inside one tick, with a clock of its own."""

from __future__ import annotations

import pytest

from tide_pipeline.defs.linger import AGAIN_S, linger


class Clock:
    """Time passes in `sleep` alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("tide_pipeline.defs.linger.time", self)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(("for_s", "looks", "took_s"), [(0.0, 1, 0.0), (0.4, 1, 0.0), (4.0, 5, 4.0)])
def test_it_looks_when_something_was_written_and_ends_in_time(monkeypatch: pytest.MonkeyPatch, for_s: float, looks: int,
                                                              took_s: float) -> None:
    clock, seen = Clock(monkeypatch), list[float]()
    found = linger(lambda: seen.append(clock.now) or clock.now, lambda at: True, lambda: clock.now // 1.0, for_s)  # a shard each second
    assert len(seen) == looks and found == seen[-1] and clock.now - 100.0 == took_s


def test_it_ends_with_what_it_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert linger(lambda: clock.now, lambda at: at < 101.0, lambda: clock.now, 4.0) == 101.0
    assert linger(lambda: clock.now, lambda at: False, lambda: clock.now, 4.0) == clock.now == 101.0


def test_what_is_written_while_it_looks_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, shards = Clock(monkeypatch), [0]

    def look() -> int:
        shards[0] = max(shards[0], 1)                  # arrives during the first look, which had listed the lake already
        looks.append(clock.now)
        return len(looks)

    looks: list[float] = []
    assert linger(look, lambda seen: seen < 2, lambda: shards[0], 4.0) == 2 and looks == [100.0, 100.0 + AGAIN_S]
