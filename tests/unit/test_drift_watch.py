"""`drift.policy` in the sensor's judge: it says what the backtest says, from the log alone, after a restart too."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import pytest
from drift_detectors import alarms, slots_of, streams

from tests.fakes_drift import config_in, traffic, write_log
from tide_pipeline.config import DRIFT_POLICIES, TideConfig, override
from tide_pipeline.contracts import DriftVerdict
from tide_pipeline.drift import watch
from tide_pipeline.drift.backtest import backtest
from tide_pipeline.drift.judge import judge_drift
from tide_pipeline.drift.replay import Key, recorded
from tide_pipeline.drift.slots import Slot

SLOT_S = watch.SLOT_S
NOW = time.time() // SLOT_S * SLOT_S
FELL = NOW - 300.0


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TideConfig:
    """Twenty-five minutes at 0.75; `de` falls to 0.45 five minutes ago, `fr` to 0.62."""
    config, rng = config_in(tmp_path_factory.mktemp("lake"), recent_s=60.0, min_steps=200), random.Random(4)
    for workload, after in (("en", 0.75), ("de", 0.45), ("fr", 0.62)):
        for begin, end, rate in ((NOW - 1500, FELL, 0.75), (FELL, NOW, after)):
            write_log(config, traffic(rng, begin, end, rate, workload=workload, requests_per_s=2.0, spread=0.1))
    return config


@pytest.fixture(autouse=True)
def nothing_seen() -> Iterator[None]:
    """Each test is a process that was just started."""
    watch._seen.clear()
    yield
    watch._seen.clear()


def verdict(config: TideConfig, policy: str, slot_end: float, workload: str) -> DriftVerdict:
    """When all of the slot is in the log: the judge's own rule looks at rows, up to the moment."""
    now = slot_end + (0.0 if policy == "judge" else config.capture.flush_s)
    found = judge_drift(override(config, {"drift": {"policy": policy}}), now)
    return next(v for v in found if v.workload == workload)


@pytest.mark.parametrize("policy", DRIFT_POLICIES)
def test_the_sensor_fires_where_the_backtest_does(config: TideConfig, policy: str) -> None:
    (outcome,) = backtest(config, [policy], NOW - 1600, NOW).outcomes
    fired = next(firing.time for firing in outcome.firings if firing.workload == "de")
    assert FELL < fired < NOW - 60 and all(firing.workload != "en" for firing in outcome.firings)
    looks = {at: verdict(config, policy, at, "de") for i in range(-3, 3) if (at := fired + i * SLOT_S) > FELL}
    first = min(at for at, v in looks.items() if v.drifted)
    assert first == fired if policy != "judge" else abs(first - fired) <= SLOT_S, {at - fired: v.reason for at, v in looks.items()}
    assert all(f"{policy} fires, " in v.reason for v in looks.values() if v.drifted and policy != "judge")


def test_a_process_that_was_just_started_says_the_same(config: TideConfig) -> None:
    ends = [FELL + i * SLOT_S for i in range(1, 46, 4)]
    looked = [verdict(config, "judge+paper", at, "fr") for at in ends]
    assert {v.drifted for v in looked} == {True, False}
    for at, before in zip(ends, looked, strict=True):
        watch._seen.clear()
        assert verdict(config, "judge+paper", at, "fr") == before


def test_a_look_back_in_time_is_not_answered_from_memory(config: TideConfig) -> None:
    """A report of a past period, in a process that looks at the present too."""
    past = verdict(config, "judge+paper", FELL, "fr")
    assert verdict(config, "judge+paper", NOW, "fr").drifted and not past.drifted
    assert verdict(config, "judge+paper", FELL, "fr") == past and verdict(config, "judge+paper", NOW, "fr").drifted


def test_only_new_slots_are_read_again(config: TideConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def asking(config: TideConfig, since: float, until: float, slot_s: float) -> Iterator[tuple[Key, Slot]]:
        asked.append(until - since)
        return recorded(config, since, until, slot_s)

    monkeypatch.setattr(watch, "recorded", asking)
    for back in (20.0, 15.0, 10.0):
        verdict(config, "judge+paper", NOW - back, "fr")
    first, *later = asked
    assert first > 3600 and max(later) <= config.drift.recent_s + watch.LEAD_S + 2 * SLOT_S


def test_what_makes_too_little_data_is_the_same_for_all(config: TideConfig, tmp_path: Path) -> None:
    v = verdict(override(config, {"drift": {"min_steps": 100_000}}), "judge+paper", NOW, "de")
    assert not v.enough_data and not v.drifted and v.reason.startswith("too little data: the baseline of v1 has ")
    young = config_in(tmp_path)
    write_log(young, traffic(random.Random(1), NOW - 60, NOW, 0.7))
    (v,) = judge_drift(override(young, {"drift": {"policy": "paper"}}), NOW - 50)
    assert not v.drifted and v.reason.endswith("paper is quiet, no request has ended after the baseline and more than 10 s ago"), v.reason


def test_falls_that_the_level_misses_are_seen_with_an_alarm_and_nothing_else_is() -> None:
    """The streams of benchmarks/drift_detectors.py, the falls of 0.15 of its table, and a day in which nothing changes."""
    known = list(enumerate(takewhile(lambda stream: stream.kind != "abrupt -0.08", streams(quick=False))))
    falls = [(stream.falls[0], slots_of(stream, i)) for i, stream in known if stream.kind == "abrupt -0.15"]
    missed = [(fall, made) for fall, made in falls if not any(fall[0] <= at for at in alarms("judge", made))]
    assert len(falls) == 10 and len(missed) == 3
    for policy, within_s in (("judge+paper", 60.0), ("judge+change", 180.0)):
        for (begin, _), made in missed:
            said = alarms(policy, made)
            assert said and begin <= said[0] < begin + within_s
        assert alarms(policy, slots_of(known[0][1], 0)) == []
