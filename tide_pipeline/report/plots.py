"""The report's plots: acceptance and speed over time, and training curves. Draws; measures and decides nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

from tide_pipeline.drift.series import Bucket
from tide_pipeline.report.data import ReportData, Span
from tide_pipeline.report.svg import GRID, INK, MUTED, PAPER, SERIES, figure, to_svg

DAY_S = 86_400
TICKS_S = (10, 30, 60, 120, 300, 600, 1800, 3600, 2 * 3600, 6 * 3600, 12 * 3600, DAY_S, 7 * DAY_S, 30 * DAY_S)
LABEL_WIDTH = 0.0068               # of the time axis, a character of a mark's label
NEAR = 0.02                        # of the time axis: marks that share a label
SMOOTH = 5                         # buckets a line is averaged over
FEW_VERSIONS = 4                   # more of them are called by their number alone
MOST_CURVES = 6                    # the newest; more of them can't be told apart
FIRST_MINUTES = 3600.0             # shorter periods count from their beginning, longer ones show the clock


def time_plot(data: ReportData) -> str:
    """Acceptance length, first-position rate and tokens/s, one above the other, with marks. "" without a series."""
    if not data.series:
        return ""
    since = data.since if data.since is not None else min(b.time for b in data.series)
    until = data.until if data.until is not None else max(b.time + b.seconds for b in data.series)
    colours = version_colours(data.series)
    marks = [(at, label) for at, label in sorted(data.marks) if since <= at <= until]
    lanes = place_labels(merged(marks, NEAR * (until - since)), since, until)
    with figure(11.0, 7.2 + 0.22 * len(lanes)) as drawing:
        top, middle, low = drawing.subplots(3, 1, sharex=True, height_ratios=(5, 3.2, 3.2))
        _lines(top, data.series, "acceptance_length", colours, since)
        _lines(middle, data.series, "first_position_rate", colours, since, label=False)
        _areas(low, data.series, colours, since)
        top.set_title("acceptance length, tokens per verification step", pad=12 + 16 * len(lanes))
        middle.set_title("first-position acceptance, share of drafted first tokens")
        has_plain = any(not b.draft_version for b in data.series)
        low.set_title("output, tokens/s, all workloads" + (" (grey: requests without speculation)" if has_plain else ""))
        top.set_ylim(1.0, 1.0 + 1.1 * max(0.5, top.get_ylim()[1] - 1.0))
        middle.set_ylim(0.0, 1.0)
        middle.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
        low.set_ylim(bottom=0.0)
        for axes in (top, middle, low):
            axes.yaxis.set_major_locator(MaxNLocator(4))
            for span in data.spans:
                axes.axvspan(max(span.begin, since) - since, min(span.end, until) - since, color=MUTED, alpha=0.10, lw=0)
            for at, _ in marks:
                axes.axvline(at - since, color=MUTED, lw=0.8, ls=(0, (2, 2)), zorder=1)
        _labels(top, lanes, since)
        for span in with_room(data.spans, since, until):
            top.annotate(span.label, (max(span.begin, since) - since, 0.02), xycoords=("data", "axes fraction"), xytext=(4, 0),
                         textcoords="offset points", color=MUTED, fontsize=9)
        time_axis(low, since, until)
        return to_svg(drawing, "time", "Acceptance length, first-position acceptance and tokens per second over time")


def training_plot(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Loss and offline acceptance over training time, a line per draft. "" without a point."""
    if not any(curves.values()):
        return ""
    newest = f", newest {MOST_CURVES} of {len(curves)} drafts" if len(curves) > MOST_CURVES else ""
    curves = dict(list(curves.items())[-MOST_CURVES:])
    with figure(11.0, 3.0) as drawing:
        left, right = drawing.subplots(1, 2)
        for axes, key, title in ((left, "loss", f"training loss{newest}"),
                                 (right, "acceptance_length", "offline acceptance length, held-out requests")):
            for i, (version, points) in enumerate(curves.items()):
                x, y = zip(*[(p["elapsed_s"], p[key]) for p in points if key in p] or [(np.nan, np.nan)], strict=True)
                colour = SERIES[(i + 1) % len(SERIES)] if len(curves) > 1 else SERIES[1]
                axes.plot(x, y, color=colour, marker="o" if key == "acceptance_length" else "", ms=4)
                axes.annotate(f"{version}  {y[-1]:.2f}", (x[-1], y[-1]), xytext=(-2, 8), textcoords="offset points", ha="right",
                              color=colour, fontsize=9)
            axes.set_title(title)
            axes.set_xlabel("seconds of training")
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.margins(y=0.18)
        return to_svg(drawing, "training", "Training loss and offline acceptance length over training time")


def version_colours(series: Sequence[Bucket]) -> dict[str, str]:
    """A colour per draft version in order of appearance; no draft is grey."""
    seen = dict.fromkeys(bucket.draft_version for bucket in sorted(series, key=lambda b: b.time))
    named = [version for version in seen if version]
    return {version: SERIES[i % len(SERIES)] for i, version in enumerate(named)} | {"": MUTED}


def merged(marks: Sequence[tuple[float, str]], near_s: float) -> list[tuple[float, str]]:
    """One label for marks that follow each other so closely that theirs would stand in a pile. In order of time."""
    out: list[tuple[float, str]] = []
    for at, label in marks:
        if out and at - out[-1][0] <= near_s:
            out[-1] = out[-1][0], f"{out[-1][1]}, {label}"
        else:
            out.append((at, label))
    return out


def place_labels(marks: Sequence[tuple[float, str]], since: float, until: float) -> list[list[tuple[float, str, bool]]]:
    """Lanes from the bottom up of (time, label, to the left of it), so that no two labels overlap."""
    lanes: list[list[tuple[float, str, bool]]] = []
    ends: list[list[tuple[float, float]]] = []
    for at, label in marks:
        width = (len(label) + 2) * LABEL_WIDTH * (until - since)
        is_left = at + width > until
        taken = (at - width, at) if is_left else (at, at + width)
        lane = next((i for i, used in enumerate(ends) if all(taken[1] <= a or b <= taken[0] for a, b in used)), len(lanes))
        if lane == len(lanes):
            lanes.append([])
            ends.append([])
        lanes[lane].append((at, label, is_left))
        ends[lane].append(taken)
    return lanes


def with_room(spans: Sequence[Span], since: float, until: float) -> list[Span]:
    """Those whose labels, at their beginnings, don't run into the one before."""
    out: list[Span] = []
    free = since
    for span in sorted(spans, key=lambda s: s.begin):
        begin = max(span.begin, since)
        if begin >= free:
            out.append(span)
            free = begin + (len(span.label) + 2) * LABEL_WIDTH * (until - since)
    return out


def smoothed(buckets: Sequence[Bucket], name: str) -> list[float]:
    """Running mean of a rate over SMOOTH buckets, each weighing what it drafted."""
    out = []
    for i in range(len(buckets)):
        near = [b for b in buckets[max(0, i - SMOOTH // 2):i + SMOOTH // 2 + 1] if getattr(b, name) is not None]
        weight = sum(b.drafted_steps for b in near)
        out.append(sum(getattr(b, name) * b.drafted_steps for b in near) / weight if weight else float("nan"))
    return out


def _lines(axes: Axes, series: Sequence[Bucket], name: str, colours: Mapping[str, str], since: float, *, label: bool = True) -> None:
    """Buckets as points, their running mean as a line, the draft version beside it."""
    has_workloads, has_many = len({b.workload for b in series}) > 1, len({b.draft_version for b in series}) > FEW_VERSIONS

    def line_of(bucket: Bucket) -> tuple[str, str]:
        return bucket.draft_version, bucket.workload

    drafted = sorted((b for b in series if getattr(b, name) is not None and b.drafted_steps > 0), key=lambda b: (*line_of(b), b.time))
    for (version, workload), group in groupby(drafted, key=line_of):
        buckets = list(group)
        x = np.array([max(b.time, since) + b.seconds / 2 - since for b in buckets])
        y = np.array(smoothed(buckets, name))
        gaps = np.flatnonzero(np.diff(x) > 3 * SMOOTH * max(b.seconds for b in buckets)) + 1
        axes.scatter(x, [getattr(b, name) for b in buckets], s=6, color=colours[version], alpha=0.35, lw=0)
        axes.plot(np.insert(x, gaps, np.nan), np.insert(y, gaps, np.nan), color=colours[version])
        if label:
            highest = max(getattr(b, name) for b in buckets[:max(1, len(buckets) // 2)])
            name_of_it = version.partition("-")[0] if has_many else version
            axes.annotate(f"{name_of_it} · {workload}" if has_workloads else name_of_it, (x[0], highest), xytext=(3, 4),
                          textcoords="offset points", color=colours[version], fontsize=10, fontweight="bold")


def _areas(axes: Axes, series: Sequence[Bucket], colours: Mapping[str, str], since: float) -> None:
    """Tokens/s by draft version, stacked; drawn as steps, a bucket wide."""
    length = max(b.seconds for b in series)
    seen = sorted({b.time for b in series})
    after = {t + length for t, following in pairwise(seen) if following > t + 1.5 * length}       # a gap is no traffic, not a slope
    before = {t - length for earlier, t in pairwise(seen) if t > earlier + 1.5 * length}
    times = sorted({*seen, *after, *before})
    edges = np.array([max(0.0, t - since) for t in times for t in (t, t + length)])
    floor = np.zeros(len(edges))
    for version, colour in colours.items():
        rates = {t: sum(b.tokens_per_s for b in series if b.time == t and b.draft_version == version) for t in times}
        height = np.repeat([rates[t] for t in times], 2)
        axes.fill_between(edges, floor, floor + height, color=colour, alpha=0.55, lw=0)
        floor += height


def _labels(axes: Axes, lanes: Sequence[Sequence[tuple[float, str, bool]]], since: float) -> None:
    for lane, marks in enumerate(lanes):
        for at, label, is_left in marks:
            foot: Any = {"xy": (at - since, 1.0), "xycoords": ("data", "axes fraction"), "textcoords": "offset points",
                         "annotation_clip": False}
            axes.annotate("", xytext=(0, 15 + 15 * lane), arrowprops={"arrowstyle": "-", "color": GRID, "lw": 0.8}, zorder=2, **foot)
            axes.annotate(label, xytext=(-3 if is_left else 3, 5 + 15 * lane), ha="right" if is_left else "left", color=INK, fontsize=9,
                          bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1.0}, zorder=3, **foot)


def time_axis(axes: Axes, since: float, until: float) -> None:
    """Minutes of a short period, the clock of a longer one; x counts seconds since its beginning."""
    span = until - since
    is_short, is_long = span <= FIRST_MINUTES, span > 2 * DAY_S
    step = next((s for s in TICKS_S if span / s <= 10 and (s >= DAY_S or not is_long)), TICKS_S[-1])
    form = "%d %b" if is_long else "%H:%M"
    # `since` seldom falls on a tick of the clock: ticks stand where the clock is round
    axes.xaxis.set_major_locator(MultipleLocator(step) if is_short else MultipleLocator(step, offset=-(since % step)))
    axes.xaxis.set_major_formatter(FuncFormatter(
        lambda x, _: f"{int(x) // 60}:{int(x) % 60:02d}" if is_short else time.strftime(form, time.gmtime(since + x))))
    axes.set_xlabel(f"minutes since {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(since))} UTC" if is_short else "UTC")
    axes.set_xlim(0, span)
