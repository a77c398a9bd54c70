"""A backtest as one HTML file: acceptance as recorded, and where each policy would have fired. Draws; replays nothing."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from string import Template

from tide_pipeline.drift.backtest import Backtest, Outcome
from tide_pipeline.drift.worth import Price
from tide_pipeline.provenance import write_atomic
from tide_pipeline.report.page import TEMPLATE
from tide_pipeline.report.parts import clock, note, plot_box, section, table
from tide_pipeline.report.svg import MUTED, SERIES, figure, to_svg

COLUMNS = ("policy", "fired", "denied by budget", "training hours", "tokens lost", "tokens gained, assumed", "net")
MINUTES = "%Y-%m-%d %H:%M"


def write_backtest(path: Path, found: Backtest, price: Price) -> None:
    """Write the page, whole or not at all."""
    write_atomic(path, render(found, price).encode())


def render(found: Backtest, price: Price) -> str:
    """The page's HTML."""
    best = max(found.outcomes, key=lambda o: o.net_tokens)
    line = (f"{found.tokens:,} tokens of {found.target}: {best.policy} would have fired {len(best.firings)} times, for "
            f"{best.net_tokens:+,.0f} tokens")
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(f"Drift backtest of {found.target}"), headline=html.escape(line),
        when=html.escape(f"{clock(found.since, MINUTES)} to {clock(found.until, MINUTES)} UTC"), body="\n".join(
            (section("Over time", plot(found)), section("Policies", _table(found.outcomes) + _assumed(price)), _firings(found.outcomes))))


def row(outcome: Outcome) -> tuple[str, ...]:
    """An outcome under COLUMNS."""
    return (outcome.policy, str(len(outcome.firings)), str(outcome.denied), f"{outcome.train_hours:.2f}", f"{outcome.lost_tokens:,.0f}",
            f"{outcome.gained_tokens:,.0f}", f"{outcome.net_tokens:+,.0f}")


def plot(found: Backtest) -> str:
    """First-position acceptance of every workload and draft, and below it a lane of firings for each policy."""
    if not found.lines:
        return "<p>No request that drafted was answered in this time.</p>"
    hours = max(found.until - found.since, 1e-9) / 3600
    with figure(11.0, 4.0 + 0.3 * len(found.outcomes)) as drawing:
        top, lanes = drawing.subplots(2, 1, sharex=True, height_ratios=(4, 0.4 * len(found.outcomes) + 0.4))
        workloads = sorted({workload for workload, _ in found.lines})
        for (workload, version), points in sorted(found.lines.items()):
            colour = SERIES[workloads.index(workload) % len(SERIES)]
            x, y = [(at - found.since) / 3600 for at, _ in points], [rate for _, rate in points]
            top.plot(x, y, color=colour, lw=1.2)
            top.annotate(f"{version} · {workload}", (x[0], y[0]), xytext=(3, 4), textcoords="offset points", color=colour, fontsize=9)
        top.set_title("first-position acceptance as recorded")
        top.set_ylim(0.0, 1.0)
        for lane, outcome in enumerate(found.outcomes):
            x = [(firing.time - found.since) / 3600 for firing in outcome.firings]
            colours = [SERIES[workloads.index(firing.workload) % len(SERIES)] for firing in outcome.firings]
            lanes.scatter(x, [-lane] * len(x), marker="|", s=120, c=colours or MUTED, linewidths=1.8)
        lanes.set_yticks([-lane for lane in range(len(found.outcomes))], [outcome.policy for outcome in found.outcomes])
        lanes.set_ylim(0.6 - len(found.outcomes), 0.6)
        lanes.set_title("would have fired")
        lanes.set_xlabel(f"hours since {clock(found.since, MINUTES)} UTC")
        lanes.set_xlim(0, hours)
        svg = to_svg(drawing, "backtest", "First-position acceptance over time and the moments at which each policy would have fired")
    return plot_box(svg)


def _table(outcomes: Sequence[Outcome]) -> str:
    return table([COLUMNS[0], *(f"#{name}" for name in COLUMNS[1:])], [row(outcome) for outcome in outcomes])


def _assumed(price: Price) -> str:
    return note(f"Assumed: a training takes {price.train_s:.0f} s and {price.slowdown:.0%} of serving while it runs; the draft it makes "
                f"wins back {price.recovery:.0%} of the drop at the firing, until the workload's next firing or for "
                f"{price.pay_back_s / 3600:.0f} h. No draft was trained for this: gains are estimates, firings are not.")


def _firings(outcomes: Sequence[Outcome], most: int = 50) -> str:
    said = sorted(((f.time, o.policy, f) for o in outcomes for f in o.firings), key=lambda one: one[:2])[:most]
    rows = [(clock(at, MINUTES), policy, f.workload, f.draft_version, f"{f.before:.2f}", f"{f.rate:.2f}") for at, policy, f in said]
    return section(f"Firings (the first {most})", table(("UTC", "policy", "workload", "draft", "#at promotion", "#when it fired"), rows))
