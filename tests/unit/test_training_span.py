"""A draft over a past window: which times are understood, what is trained on then, and that what is held out stays the same."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest

from tests.fakes_training import captured, open_target, tiny_engine, to_lake
from tide_pipeline.capture.reader import count_rows, list_windows
from tide_pipeline.config import TideConfig, override
from tide_pipeline.errors import InvalidRequest, NotEnoughSignals
from tide_pipeline.training.data import find_windows
from tide_pipeline.training.span import ALWAYS, Span
from tide_pipeline.training.target_head import target_head_of

MINUTE_S, REQUESTS, ROWS = 60.0, 40, 32


def test_times_are_utc_unless_they_say_otherwise() -> None:
    span = Span.of("2026-11-20T09:00", "2026-11-20T13:30:00+01:00")
    assert span == Span.of("2026-11-20 09:00:00Z", "2026-11-20T12:30Z") and span.until - span.since == 3.5 * 3600
    assert span.facts == {"captured_since": "2026-11-20T09:00:00Z", "captured_until": "2026-11-20T12:30:00Z"}
    assert Span.of(*span.texts) == span and span.since in span and span.until not in span
    assert str(span) == "since 2026-11-20T09:00:00Z until 2026-11-20T12:30:00Z"


def test_an_open_end_is_said_by_nothing() -> None:
    assert Span.of("", "") == ALWAYS and ALWAYS.is_all and ALWAYS.facts == {}
    assert Span.of("", "2026-11-20").facts == {"captured_until": "2026-11-20T00:00:00Z"}
    assert time.time() in Span.of("2026-11-20", "") and Span.of("", "2026-11-20").since == 0


@pytest.mark.parametrize(("since", "until", "why"), [
    ("yesterday", "", "since 'yesterday' is no time: write it as 2026-11-20T09:00"),
    ("", "2026-13-01", "until '2026-13-01' is no time"),
    ("2026-11-20T09:00", "2026-11-20T09:00", "exchange them"),
    ("2999-01-01", "", "in the future, nothing can have been captured then: is it local time")])
def test_what_makes_no_sense_is_refused(since: str, until: str, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        Span.of(since, until)


@pytest.fixture(scope="module")
def began() -> float:
    return time.time() - (REQUESTS + 1) * MINUTE_S


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, began: float) -> TideConfig:
    """A request of de and one of py each minute."""
    config = override(tiny_engine(tmp_path_factory.mktemp("span")), {"training": {"eval_share": 0.25, "min_prompts": 2}})
    target = open_target(config)
    to_lake(config, [dataclasses.replace(w, window=dataclasses.replace(w.window, closed_at=began + i * MINUTE_S))
                     for of in (captured(target, "de", REQUESTS), captured(target, "py", REQUESTS, seed=1)) for i, w in enumerate(of)])
    return config


def test_only_the_period_is_trained_on_and_the_held_out_prompts_stay(config: TideConfig, began: float) -> None:
    digest, span = target_head_of(config).digest, Span(began + 5 * MINUTE_S, began + 15 * MINUTE_S)
    always, past = find_windows(config, "de", digest), find_windows(config, "de", digest, span=span)
    assert past.focus_held_out == always.focus_held_out and past.replay_held_out == always.replay_held_out
    assert past.focus == [w for w in always.focus if w.closed_at in span] != []
    assert past.replay == [w for w in always.replay if w.closed_at in span] != []
    assert find_windows(config, "de", digest, span=Span(0.0, time.time())) == always


def test_a_past_behind_the_newest_windows_is_found(config: TideConfig, began: float) -> None:
    """`max_windows` counts from the end of the period, not from now."""
    few = override(config, {"training": {"max_windows": 12}})
    span = Span(began, began + 4.5 * MINUTE_S)
    past = find_windows(few, "de", target_head_of(config).digest, span=span)
    assert past.focus and all(w.closed_at in span for w in past.train)


def test_an_empty_period_is_named(config: TideConfig, began: float) -> None:
    span = Span(began - 2_000 * MINUTE_S, began - 1_000 * MINUTE_S)
    with pytest.raises(NotEnoughSignals, match=r"0 prompts of workload 'de' captured since 20.*Z until 20.*Z to train on"):
        find_windows(config, "de", target_head_of(config).digest, span=span)


def test_the_reader_stops_before_until(config: TideConfig, began: float, tmp_path: Path) -> None:
    until = began + 2.5 * MINUTE_S
    found = list_windows(config.state.signals, config.target, until=until).windows
    assert len(found) == 6 and max(w.closed_at for w in found) < until
    assert count_rows(config.state.signals, config.target, since=began + 0.5 * MINUTE_S, until=until) == 4 * ROWS
    assert count_rows(tmp_path, config.target, until=until) == 0
