"""Histograms, the outbox and the series that are told to Triton: what Grafana will add up."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from tests.helpers import ask
from tide_pipeline.contracts import FinishReason, StepEvent, StepKind, TokenChunk
from tide_pipeline.engine.protocol import NullSink
from tide_pipeline.serve.answer import Answer
from tide_pipeline.serve.histogram import Histogram
from tide_pipeline.serve.outbox import Outbox
from tide_pipeline.serve.request import Asked
from tide_pipeline.serve.series import HistogramSeries, Series
from tide_pipeline.serve.tally import Counts, TallySink
from tide_pipeline.serve.waits import Waits


def test_a_histogram_counts_at_most() -> None:
    histogram = Histogram((0.1, 1.0))
    for value, times in ((0.05, 1), (0.1, 2), (0.5, 3), (7.0, 1)):
        histogram.observe(value, times)
    found = histogram.read()
    assert found.at_most == {"0.1": 3, "1": 6, "+Inf": 7} and found.count == 7
    assert found.total == pytest.approx(0.05 + 0.2 + 1.5 + 7.0)


def test_the_outbox_keeps_order_outlives_failures_and_ends_when_empty() -> None:
    outbox, called, gate = Outbox(), [], threading.Event()

    def fail() -> None:
        raise RuntimeError("a prompt may be quoted here")

    outbox.put(gate.wait)                                      # type: ignore[arg-type]
    for i in range(5):
        outbox.put(lambda i=i: called.append(i))               # type: ignore[misc]
        outbox.put(fail)
    assert called == [] and outbox.waiting() >= 9, "who puts does not wait"
    gate.set()
    outbox.close()
    assert called == [0, 1, 2, 3, 4] and outbox.delay.read().count == 11 and outbox.waiting() == 0


class Told:
    """pb_utils as far as metrics go: remembers every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, float]] = []
        self.kinds: dict[str, str] = {}
        told = self

        class Metric:
            def __init__(self, name: str, labels: dict[str, str]) -> None:
                self.key = name + ",".join(f"{k}={v}" for k, v in sorted(labels.items()))

            def increment(self, value: float) -> None:
                told.calls.append(("increment", self.key, value))

            def set(self, value: float) -> None:
                told.calls.append(("set", self.key, value))

        class MetricFamily:
            COUNTER, GAUGE = "counter", "gauge"

            def __init__(self, name: str, description: str, kind: str) -> None:
                told.kinds[name], self.name = kind, name

            def Metric(self, labels: dict[str, str]) -> Any:
                return Metric(self.name, labels)

        self.MetricFamily = MetricFamily


def test_a_series_tells_what_has_changed_and_nothing_else() -> None:
    told = Told()
    counter, gauge = (Series(told, name, "", {"a": "b"}, is_counter=name == "n_total") for name in ("n_total", "g"))
    for value in (0.0, 3.0, 3.0, 5.0):
        counter.put(value)
        gauge.put(value, draft_version="v1")
    assert told.calls == [("increment", "n_totala=b", 0.0), ("set", "ga=b,draft_version=v1", 0.0), ("increment", "n_totala=b", 3.0),
                          ("set", "ga=b,draft_version=v1", 3.0), ("increment", "n_totala=b", 2.0), ("set", "ga=b,draft_version=v1", 5.0)]
    gauge.clear_others("draft_version", {"v1"})
    assert len(told.calls) == 6
    gauge.clear_others("draft_version", {"v2"})
    assert told.calls[6:] == [("set", "ga=b,draft_version=v1", 0.0)]


def test_a_histogram_series_is_prometheus_own() -> None:
    told, histogram = Told(), Histogram((0.1, 1.0))
    series = HistogramSeries(told, "t_seconds", "", {})
    histogram.observe(0.5)
    series.put(histogram.read())
    histogram.observe(0.05, 2)
    series.put(histogram.read())
    totals: dict[str, float] = {}
    for _, key, value in told.calls:
        totals[key] = totals.get(key, 0.0) + value
    assert totals == {"t_seconds_bucketle=0.1": 2, "t_seconds_bucketle=1": 3, "t_seconds_bucketle=+Inf": 3, "t_seconds_count": 3,
                      "t_seconds_sum": pytest.approx(0.6)}
    assert set(told.kinds.values()) == {"counter"}


def step(kind: StepKind, emitted: int, drafted: int = 0, accepted: int = 0) -> StepEvent:
    return StepEvent("a", kind, 0, (1,), (1,) * emitted, (1,) * drafted, accepted, "v1", drafted, 1, 1.0, None)


def test_positions_are_counted_where_they_were_drafted() -> None:
    tally = TallySink(NullSink())
    tally.on_step([step(StepKind.VERIFY, 3, drafted=3, accepted=2), step(StepKind.VERIFY, 1, drafted=1, accepted=0)])
    tally.on_step([step(StepKind.DECODE, 1)])
    counts = tally.by_version()["v1"]
    assert counts.by_position == ((2, 1), (1, 1), (1, 0)) and counts.position_rates == [0.5, 1.0, 0.0]
    assert (counts.steps, counts.verify_steps, counts.first_position_rate, counts.acceptance_length) == (3, 2, 0.5, 2.0)
    assert (counts - Counts(by_position=((1, 1),))).by_position == ((1, 0), (1, 1), (1, 0))


def test_a_gap_is_shared_by_the_tokens_of_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    tally, now = TallySink(NullSink()), [10.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    tally.on_step([step(StepKind.PREFILL, 0)])                 # a prompt's first chunk gives no token
    tally.on_step([step(StepKind.PREFILL, 1)])
    for emitted in (4, 1):
        now[0] += 0.2
        tally.on_step([step(StepKind.VERIFY, emitted, drafted=3, accepted=emitted - 1)])
    assert tally.prefill_s == pytest.approx(0.002)
    found = tally.inter_token.read()
    assert found.count == 5 and found.total == pytest.approx(0.4) and found.at_most["0.05"] == 4


class Heard:
    def __init__(self) -> None:
        self.heard: list[dict[str, str]] = []

    def send(self, outputs: dict[str, str], *, is_last: bool) -> None:
        self.heard.append(outputs)

    def fail(self, kind: Any, message: str) -> None: ...

    def is_cancelled(self) -> bool:
        return False


def test_first_tokens_and_ends_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waits, now = Waits(), [5.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    answer = Answer(Asked(ask("a", "x"), True, False, True, True, False, began=2.0), Heard(), lambda request_id: None, waits)
    for tokens, reason in (((), None), ((1,), None), ((2, 3), None), ((4,), FinishReason.LENGTH)):
        answer(TokenChunk("a", tokens, "", reason))
        now[0] += 1.0
    first = waits.first_token.read()
    assert (first.count, first.total) == (1, 4.0)
    assert waits.finished() == {"stop": 0, "length": 1, "cancelled": 0, "deadline": 0, "error": 0}
