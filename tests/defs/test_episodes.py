"""When a drift is worth an adaptation, decided from plain numbers."""

from __future__ import annotations

import dataclasses
import math

import pytest

from tide_pipeline.config import DriftSettings
from tide_pipeline.contracts import DriftVerdict
from tide_pipeline.defs.episodes import (
    LEAD_S,
    MOST_KEPT,
    UNSURE_S,
    Episode,
    Memory,
    enough_in_s,
    follow,
    is_close,
    is_falling,
    kept,
    run_key,
    why_too_few,
    why_wait,
)

SETTINGS = DriftSettings(recent_s=60.0, min_signal_rows=20_000, cooldown_s=60.0, max_attempts=3)
NOW = 1_000_000.0
DRIFTED = DriftVerdict("pocket", "code", True, True, 0.4, 0.7, 0.3, 0.2, 0.4, 500, 900, "v1", "0.40 against 0.70")
HEALTHY = dataclasses.replace(DRIFTED, drifted=False, drop=0.02, drop_low=-0.06, drop_high=0.1)
FALLING = dataclasses.replace(DRIFTED, drifted=False, drop_low=0.03)             # controlled down to a few drafted steps
UNSURE = dataclasses.replace(DRIFTED, drifted=False, enough_data=False)


def test_an_episode_opens_with_the_judged_window() -> None:
    opened = follow(Episode(), DRIFTED, NOW, SETTINGS)
    assert opened == Episode(number=1, since=NOW - 60.0, certain=NOW, draft_version="v1")
    assert follow(opened, DRIFTED, NOW + 5, SETTINGS) == dataclasses.replace(opened, certain=NOW + 5)


def test_recovery_closes_it_and_the_next_drift_is_another_one() -> None:
    used = dataclasses.replace(follow(Episode(), DRIFTED, NOW, SETTINGS), attempts=3)
    closed = follow(used, HEALTHY, NOW + 5, SETTINGS)
    assert not closed.is_open
    again = follow(closed, DRIFTED, NOW + 10, SETTINGS)
    assert (again.number, again.attempts, again.since) == (2, 0, NOW - 50.0)


def test_a_verdict_that_gets_unsure_again_closes_nothing() -> None:
    """A draft that is useless is hardly drafted with: its interval widens, whatever its rate."""
    opened = dataclasses.replace(follow(Episode(), DRIFTED, NOW, SETTINGS), attempts=2)
    assert follow(opened, FALLING, NOW + 5, SETTINGS) == opened
    assert follow(Episode(), FALLING, NOW, SETTINGS) == Episode(), "nor does it open any"
    assert follow(opened, FALLING, NOW + UNSURE_S, SETTINGS) == opened, "attempts are not given anew, nor is a build that passed forgotten"
    untried = dataclasses.replace(opened, attempts=0)
    assert not follow(untried, FALLING, NOW + UNSURE_S, SETTINGS).is_open, "nothing was certain for ten minutes"
    assert not follow(opened, dataclasses.replace(FALLING, draft_version="v2"), NOW + 5, SETTINGS).is_open


def test_a_new_draft_version_begins_a_new_episode() -> None:
    first = dataclasses.replace(follow(Episode(), DRIFTED, NOW, SETTINGS), attempts=2)
    second = follow(first, dataclasses.replace(DRIFTED, draft_version="v2"), NOW + 5, SETTINGS)
    assert (second.number, second.attempts, second.draft_version) == (2, 0, "v2")


def test_too_little_data_changes_nothing() -> None:
    opened = follow(Episode(), DRIFTED, NOW, SETTINGS)
    assert follow(opened, UNSURE, NOW + 5, SETTINGS) == opened
    assert follow(Episode(), UNSURE, NOW, SETTINGS) == Episode()


@pytest.mark.parametrize(("episode", "words"), [
    (Episode(number=1, attempts=1, last_run=NOW - 22), "22 s ago: cooling down for another 38 s"),
    (Episode(number=4, attempts=3), "all 3 attempts of episode 4"),
    (Episode(number=1, attempts=1, last_run=NOW - 61), ""),
])
def test_why_a_drifted_workload_waits(episode: Episode, words: str) -> None:
    reason = why_wait(episode, NOW, SETTINGS)
    assert words in reason and bool(words) == bool(reason)


def test_a_training_needs_signals() -> None:
    assert "only 8,100 of 20,000 signal rows" in why_too_few(8_100, 90.0, SETTINGS) and why_too_few(20_000, 0.0, SETTINGS) == ""


def test_what_will_be_there_when_the_trainer_looks_is_enough() -> None:
    """A run takes seconds to start, in which signals go on coming."""
    assert enough_in_s(15_000, 100.0, SETTINGS) == 50.0 and enough_in_s(20_000, 0.0, SETTINGS) == 0.0
    assert enough_in_s(19_999, 0.0, SETTINGS) == math.inf
    nearly = 20_000 - round(LEAD_S * 100.0)
    assert why_too_few(nearly, 100.0, SETTINGS) == "" and f"only {nearly - 1:,}" in why_too_few(nearly - 1, 100.0, SETTINGS)
    assert why_too_few(15_000, 1e6, SETTINGS) == "" and why_too_few(14_999, 1e6, SETTINGS), "three quarters, at any rate"


@pytest.mark.parametrize(("verdict", "falling"), [
    (DRIFTED, False), (UNSURE, False), (HEALTHY, False), (FALLING, True),
    (dataclasses.replace(FALLING, drop=0.09), False), (dataclasses.replace(FALLING, drop=SETTINGS.min_drop), True),
])
def test_what_falls_by_its_estimate_is_no_recovery(verdict: DriftVerdict, falling: bool) -> None:
    assert is_falling(verdict, SETTINGS) is falling


@pytest.mark.parametrize(("verdict", "settings", "close"), [
    (FALLING, SETTINGS, True), (dataclasses.replace(FALLING, drop_low=-0.11), SETTINGS, False), (HEALTHY, SETTINGS, False),
    (FALLING, dataclasses.replace(SETTINGS, policy="paper"), False),
])
def test_what_may_be_a_drift_in_a_moment(verdict: DriftVerdict, settings: DriftSettings, close: bool) -> None:
    assert is_close(verdict, settings) is close


def test_what_is_remembered_is_bounded() -> None:
    """Tags come from clients; numbers come back from the tags of runs."""
    lately = NOW - 3600
    open_ = {"open": Episode(2, 1, since=lately, seen=lately), "cooling": Episode(3, 2, last_run=NOW - 59, seen=lately)}
    over = {"healthy": Episode(seen=NOW), "closed": Episode(7, 2, last_run=NOW - 61, seen=NOW),
            "gone": Episode(1, since=1.0, seen=NOW - 86_401)}
    assert kept(open_ | over, NOW, SETTINGS) == {"cooling": open_["cooling"], "open": open_["open"]}
    invented = {f"tag {i}": Episode(1, since=lately, seen=NOW - i) for i in range(5_000)}
    left = kept(invented | {"adapted to": Episode(1, 1, since=lately, last_run=lately, seen=lately)}, NOW, SETTINGS)
    assert len(left) == MOST_KEPT and "adapted to" in left and "tag 0" in left and "tag 4999" not in left
    assert len(Memory(NOW, NOW, left).to_cursor()) < 40_000


def test_every_attempt_has_its_own_key() -> None:
    assert run_key(DRIFTED, Episode(number=2, attempts=1)) == "pocket/code/2/1"
    assert run_key(DRIFTED, Episode(number=2, attempts=2)) == "pocket/code/2/2"


def test_the_memory_survives_a_cursor() -> None:
    memory = Memory(13.0, 12.5, {"code": Episode(2, 1, NOW, NOW, "v1", NOW)}, 2)
    assert Memory.from_cursor(memory.to_cursor()) == memory
    assert Memory.from_cursor(None) == Memory.from_cursor("") == Memory()


@pytest.mark.parametrize("cursor", [
    "{", "[]", "17", "null", '{"episodes": []}', '{"looked_at": 1, "observed_at": 1, "episodes": {"a": {"wrong": 1}}}'])
def test_a_foreign_cursor_is_told_apart(cursor: str) -> None:
    with pytest.raises(ValueError):
        Memory.from_cursor(cursor)
