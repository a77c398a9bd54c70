"""Collection control: Algorithm 1, the best-EMA bar, the replay share, opting out and the byte budget."""

from __future__ import annotations

import pytest

from tide_pipeline.capture.control import MAX_WORKLOADS, CollectionControl
from tide_pipeline.config import CaptureSettings

AUTO = CaptureSettings(init_requests=4)


def feed(control: CollectionControl, value: float, times: int, workload: str = "w") -> None:
    for _ in range(times):
        control.observe(workload, value)


def collecting(control: CollectionControl, workload: str = "w") -> bool:
    return bool(control.state()[f"collecting.{workload}"])


def test_emas_follow_the_paper() -> None:
    control = CollectionControl(AUTO)
    for alpha in (0.5, 0.7, 0.9, 0.7):
        control.observe("w", alpha)
    assert control.state()["ema_short.w"] == control.state()["ema_long.w"] == pytest.approx(0.7)
    control.observe("w", 0.2)
    assert control.state()["ema_short.w"] == pytest.approx(0.9 * 0.7 + 0.1 * 0.2)
    assert control.state()["ema_long.w"] == pytest.approx(0.99 * 0.7 + 0.01 * 0.2)


def test_collects_until_initialised_then_rests() -> None:
    control = CollectionControl(AUTO)
    assert control.should_collect("new tag", "t")
    feed(control, 0.8, 3)
    assert collecting(control)
    feed(control, 0.8, 1)
    assert not collecting(control)


def test_starts_on_a_drop_and_stops_with_hysteresis() -> None:
    control = CollectionControl(AUTO)
    feed(control, 0.8, 20)
    assert not collecting(control)
    feed(control, 0.3, 2)
    assert collecting(control)
    feed(control, 0.8, 8)                        # back above long - eps, below long - eps / 2
    state = control.state()
    assert state["ema_long.w"] - 0.05 < state["ema_short.w"] < state["ema_long.w"] - 0.025
    assert collecting(control)
    feed(control, 0.8, 20)
    assert not collecting(control)


def test_slow_decay_is_seen_against_the_best_long_ema() -> None:
    control = CollectionControl(AUTO)
    feed(control, 0.9, 120)
    for i in range(2000):                        # the two EMAs alone never differ by eps
        control.observe("w", 0.9 - 0.3 * i / 2000)
        state = control.state()
        assert state["ema_long.w"] - state["ema_short.w"] < 0.05
    assert collecting(control)
    feed(control, 0.6, 1000)                     # steady, but still below the bar
    assert collecting(control)
    control.on_draft_changed("w")
    feed(control, 0.6, 4)
    assert not collecting(control)


def test_a_workload_that_was_never_served_well_goes_on_collecting() -> None:
    control = CollectionControl(AUTO)
    feed(control, 0.3, 500)
    assert collecting(control)


def test_every_tenth_request_is_collected_anyway() -> None:
    control = CollectionControl(AUTO)
    feed(control, 0.8, 10)
    assert [control.should_collect("w", "t") for _ in range(20)] == ([False] * 9 + [True]) * 2


def test_modes_and_tenants() -> None:
    assert not CollectionControl(CaptureSettings(mode="off")).should_collect("w", "t")
    on = CollectionControl(CaptureSettings(mode="on", opted_out_tenants=("private",)))
    feed(on, 0.8, 100)
    assert on.should_collect("w", "t")
    assert not on.should_collect("w", "private")


def test_the_byte_budget_is_per_clock_hour() -> None:
    control = CollectionControl(CaptureSettings(mode="on", max_bytes_per_hour=1000))
    assert control.should_collect("w", "t", now=7200.0)
    control.spend(1000, now=7201.0)
    assert not control.should_collect("w", "t", now=7202.0)
    assert not control.should_collect("w", "t")
    assert control.should_collect("w", "t", now=10800.0)


def test_client_chosen_tags_take_bounded_memory() -> None:
    control = CollectionControl(AUTO)
    for i in range(3 * MAX_WORKLOADS):
        control.should_collect(f"tag{i}", "t")
        control.should_collect("busy", "t")
    state = control.state()
    assert sum(key.startswith("collecting.") for key in state) == MAX_WORKLOADS
    assert "collecting.busy" in state


def test_a_share_of_the_requests_and_some_workloads_only() -> None:
    control = CollectionControl(CaptureSettings(mode="on", share=0.25, workloads=("code", "chat")))
    assert sum(control.should_collect("code", "t") for _ in range(100)) == 25
    assert not any(control.should_collect("other", "t") for _ in range(100))


def test_a_small_lasting_drop_within_epsilon_is_seen() -> None:
    """Short EMA and best differ by less than epsilon for good; the change-point test adds the drop up."""
    control = CollectionControl(CaptureSettings(epsilon=0.3, change_delta=0.05, change_threshold=2.0))
    for _ in range(200):
        control.observe("w", 0.8)
    assert control.state()["collecting.w"] is False
    found = []
    for i in range(60):
        control.observe("w", 0.62)
        if control.state()["collecting.w"]:
            found.append(i)
    assert found and found[0] < 40
