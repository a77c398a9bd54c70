"""The report page: what it shows, what it leaves out, and that it needs nothing from outside."""

from __future__ import annotations

import dataclasses
import itertools
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes_drift import config_in
from tests.fakes_report import NEW, OLD, demo_state, phases
from tide_pipeline.contracts import Deployment
from tide_pipeline.drift.series import Bucket
from tide_pipeline.report.data import ReportData, Span
from tide_pipeline.report.page import headline, render, write_report
from tide_pipeline.report.period import MOST_BUCKETS, bucket_of, collect, rollout_marks
from tide_pipeline.report.plots import MOST_CURVES, merged, place_labels, smoothed, with_room

STAGES = {"detect and collect": 54.2, "train": 79.9, "gate": 11.0}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A demo's report, collected from what is on disk."""
    config, now = config_in(tmp_path_factory.mktemp("report")), time.time()
    data = collect(config, demo_state(config, now), now)
    marks = [*data.marks, (now - 240, "shifted: py → de")]
    path = config.state.reports / "report.html"
    write_report(path, dataclasses.replace(data, phases=phases(), stages_s=STAGES, marks=marks))
    return path.read_text()


class Headings(HTMLParser):
    """Titles of sections, and whether every element was closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.found.append(data)


def bucket(at: float, version: str = "v1", workload: str = "default", rate: float | None = 0.7) -> Bucket:
    return Bucket(at, 2.0, workload, version, rate, None if rate is None else 1 + 2 * rate, 150.0, 40, 0 if rate is None else 30, 5)


def test_every_section(page: str) -> None:
    assert Headings(page).found == ["What speculation is worth", "What drafts saved", "Over time", "The adaptation", "Drift", "Training",
                                    "Gate", "Deployments", "Machine and settings"]
    for said in (OLD, NEW, "1.72x", "temperature 0.8, all", "greedy, looping", "145.1 s", "gain +1.14 [+1.05, +1.22]", "shifted: py",
                 f"stable: {NEW}", f"training {NEW}", "held-out requests", "drift: default",
                 "drop 0.42 (0.40 to 0.44)", "21,000", "with no speculation"):
        assert said in page, said


def test_nothing_is_loaded_from_outside(page: str) -> None:
    assert not re.search(r"<script|<link|<img|@import|src=|url\((?!#)", page)
    assert not [target for target in re.findall(r'href="([^"]*)"', page) if not target.startswith("#")]
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_plots_take_their_colours_from_the_page(page: str) -> None:
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.S))
    assert "var(--series-0)" in drawn and "var(--series-1)" in drawn and not re.search(r"#0[1-5]0[1-5]0[1-6]", drawn)
    assert "prefers-color-scheme: dark" in page


def test_ids_are_unique_and_svg_is_well_formed(page: str) -> None:
    plots = re.findall(r'<svg role="img".*?</svg>', page, re.S)
    assert len(plots) == 3
    ids = [element.get("id") for plot in plots for element in ElementTree.fromstring(plot).iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    for plot in plots:
        assert set(re.findall(r"(?:url\(#|href=\"#)([\w-]+)", plot)) <= set(ids)


def test_an_empty_page_and_each_part_alone() -> None:
    assert Headings(render(ReportData())).found == []
    assert Headings(render(ReportData(phases=[{"name": "healthy", "acceptance_length": 2.5}]))).found == ["What speculation is worth"]
    assert Headings(render(ReportData(series=[bucket(1e9)]))).found == ["Over time"]
    assert Headings(render(ReportData(series=[bucket(1e9, "", rate=None)]))).found == ["Over time"]
    assert Headings(render(ReportData(stages_s={"train": 3.0}))).found == ["The adaptation"]
    assert Headings(render(ReportData(training={"v2": [{"elapsed_s": 1.0, "loss": 3.0}]}))).found == ["Training"]
    assert Headings(render(ReportData(facts={"machine": "x86_64 x2"}))).found == ["Machine and settings"]


def test_text_of_others_is_escaped() -> None:
    evil = "<script>alert(1)</script>$x_1$"
    data = ReportData(title=evil, phases=[{"name": evil, "speedup": 1.2}], series=[bucket(1e9, evil, evil), bucket(1e9 + 2, evil, "b")],
                      marks=[(1e9 + 1, evil)], spans=[Span(1e9, 1e9 + 1, evil)], stages_s={evil: 1.0}, facts={evil: evil})
    text = render(data)
    assert "<script" not in text and "&lt;script&gt;" in text


def test_days_and_several_workloads_are_drawn() -> None:
    series = [bucket(1.7e9 + 3600 * i, f"v{i // 30}", workload) for i in range(100) for workload in ("en", "de")]
    text = render(ReportData(series=series))
    assert "v0 · en" in text and "v3 · de" in text and "16 Nov" in text
    assert "4.1 days" in text


def test_headline() -> None:
    assert headline(ReportData(phases=phases(), stages_s=STAGES)) == (
        "Speculation was worth 1.72x before the traffic shifted, 0.99x after the shift with the old draft, and 1.63x with a draft trained "
        "on the new traffic, 145 s after it.")
    assert headline(ReportData(series=[bucket(1e9), bucket(1e9 + 2, "")])) == "600 tokens served with 1 draft version"


def test_a_period_without_anything(tmp_path: Path) -> None:
    data = collect(config_in(tmp_path), 1e9, 1e9 + 60)
    assert not data.series and not data.marks and not data.gates and not data.training
    assert Headings(render(data)).found == ["Machine and settings"]


def test_a_period_takes_only_its_own(tmp_path: Path) -> None:
    config, now = config_in(tmp_path), time.time()
    began = demo_state(config, now)
    data = collect(config, began, now)
    assert [d.n for d in data.deployments] == [2] and list(data.training) == [NEW] and len(data.spans) == len(data.gates) == 1
    assert {b.draft_version for b in data.series} == {"", OLD, NEW} and data.verdicts[0].draft_version == NEW
    early = collect(config, began, now - 200)
    assert not early.deployments and not early.training and not early.spans and not early.gates and not early.trainings
    assert [d.draft_version for d in data.drifts] == [NEW] and data.trainings[0].seconds == 75.0 and len(early.drifts) == 1
    assert collect(config, began, now, with_savings=False).savings is None


def test_an_ended_rollout_is_marked_once() -> None:
    def record(n: int, stage: str, began: int, group: str) -> Deployment:
        return Deployment(n, "pocket", {"rest": {"*": "a"}, group: {"*": "b"}}, (), stage, "tests", "test", float(n), "*", began)

    ended = [record(2, "canary", 2, "canary"), record(3, "rolling", 2, "canary"), record(4, "stable", 2, "rest")]
    going = record(5, "canary", 5, "canary")
    assert rollout_marks([*ended, going], {"a": "v1", "b": "v2"}) == [(4.0, "stable: v2"), (5.0, "canary: v2")]


def test_buckets_are_round_and_not_too_many() -> None:
    assert bucket_of(300.0) == 2.0 and bucket_of(86_400.0) == 600.0
    assert all(seconds / bucket_of(seconds) <= MOST_BUCKETS for seconds in (10.0, 1e3, 1e5, 1e6))


marks = st.lists(st.tuples(st.floats(0, 100), st.text("abc ", min_size=1, max_size=40)), max_size=12).map(sorted)


@given(marks=marks)
def test_labels_never_overlap(marks: list[tuple[float, str]]) -> None:
    lanes = place_labels(marks, 0.0, 100.0)
    assert sorted((at, label) for lane in lanes for at, label, _ in lane) == marks
    for lane in lanes:
        spans = [(at - w, at) if is_left else (at, at + w) for at, label, is_left in lane for w in [(len(label) + 2) * 0.68]]
        assert all(a[1] <= b[0] or b[1] <= a[0] for i, a in enumerate(spans) for b in spans[:i])


@given(begins=st.lists(st.floats(-20, 100), max_size=30))
def test_labels_of_trainings_have_room(begins: list[float]) -> None:
    out = with_room([Span(begin, begin + 1, "training v2-1f0a9c2b") for begin in begins], 0.0, 100.0)
    width = (len("training v2-1f0a9c2b") + 2) * 0.68
    assert all(max(b.begin, 0.0) - max(a.begin, 0.0) >= width for a, b in itertools.pairwise(out)) and bool(out) == bool(begins)


def test_a_month_of_drafts_shows_the_curves_of_the_newest() -> None:
    curves = {f"v{i}": [{"elapsed_s": 0.0, "loss": 3.0}, {"elapsed_s": 1.0, "loss": 2.0}] for i in range(1, MOST_CURVES + 3)}
    text = render(ReportData(training=curves))
    assert "newest 6 of 8 drafts" in text and "v8  2.00" in text and "v2  2.00" not in text
    assert "newest" not in render(ReportData(training={"v1": curves["v1"]}))


@given(marks=marks)
def test_merging_loses_no_label(marks: list[tuple[float, str]]) -> None:
    out = merged(marks, 5.0)
    assert ", ".join(label for _, label in out) == ", ".join(label for _, label in marks)
    assert all(b[0] - a[0] > 5.0 for a, b in itertools.pairwise(out))


@given(rates=st.lists(st.none() | st.floats(0, 1), min_size=1, max_size=30))
@settings(max_examples=50)
def test_a_running_mean_stays_within_what_it_averages(rates: list[float | None]) -> None:
    known = [r for r in rates if r is not None]
    out = smoothed([bucket(2.0 * i, rate=r) for i, r in enumerate(rates)], "first_position_rate")
    assert len(out) == len(rates) and all(v != v or min(known) - 1e-9 <= v <= max(known) + 1e-9 for v in out)
