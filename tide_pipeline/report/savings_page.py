"""What was saved, as people read it: a table, a line over time, how it was found. Draws; adds nothing up."""

from __future__ import annotations

import numpy as np

from tide_pipeline.report.parts import DASH, Html, note, plot_box, section, table
from tide_pipeline.report.plots import time_axis
from tide_pipeline.report.savings import STATIC, Interval, Savings
from tide_pipeline.report.svg import MUTED, SERIES, figure, to_svg

LEAST_SHARE = 0.005                # of the served time: what can't be judged is told from there on


def savings_section(found: Savings | None, since: float, until: float, untimed: int = 0) -> str:
    """"" where nothing was served. Times: the period. `untimed`: trainings whose seconds nobody knows."""
    if found is None or not found.against:
        return ""
    return section("What drafts saved", _sums(found) + plot_box(savings_plot(found, since, until)) + _replays(found) + _how(found, untimed))


def in_words(found: Savings | None) -> str:
    """For the headline; "" where nothing could be judged."""
    told = [f"{_signed(a.saved_s.estimate - found.training_s)} against {a.name}" for a in found.against] if found else []
    return f"{' and '.join(told)}, training paid" if told else ""


def untimed_in_words(trainings: int) -> str:
    """"" where all left a record."""
    return f"{trainings} training{'s' * (trainings != 1)} left no record of their time: not in these sums." if trainings else ""


def savings_plot(found: Savings, since: float, until: float) -> str:
    """Seconds saved so far, trainings taken off when they end."""
    lines = [a for a in found.against if a.line]
    if not lines:
        return ""
    with figure(11.0, 3.0) as drawing:
        axes = drawing.subplots()
        for i, against in enumerate(lines):
            at, y, low, high = (np.array(values) for values in zip(*against.line, strict=True))
            spent = np.array([sum(seconds for ended, seconds in found.training if ended <= t) for t in at])
            axes.fill_between(at - since, low - spent, high - spent, color=SERIES[i], alpha=0.18, lw=0)
            axes.plot(at - since, y - spent, color=SERIES[i])
            axes.annotate(f"against {against.name}", (at[-1] - since, y[-1] - spent[-1]), xytext=(-4, -14 if i else 8),
                          textcoords="offset points", ha="right", color=SERIES[i], fontsize=10, fontweight="bold")
        axes.axhline(0.0, color=MUTED, lw=1.0)
        axes.margins(y=0.18)
        axes.set_title("seconds of the serving device saved so far, seconds of training taken off")
        time_axis(axes, since, until)
        return to_svg(drawing, "savings", "Seconds saved so far against no speculation and against the static draft")


def _sums(found: Savings) -> str:
    rows = [["as served", f"{found.tokens / found.served_s:,.0f}", f"{found.served_s:,.0f}", DASH, DASH, DASH, "100%"]]
    for a in found.against:
        net = Interval(*(value - found.training_s for value in (a.saved_s.estimate, a.saved_s.low, a.saved_s.high)))
        rows.append([f"with {a.name}", _span(a.tokens_per_s), _span(a.seconds), _span(a.saved_s), f"{found.training_s:,.0f}", _net(net),
                     f"{a.judged_share:.0%}"])
    return table(("", "#tokens/s of the device", "#seconds of it", "#saved, s", "#training, s", "#net, s", "#judged"), rows)


def _replays(found: Savings) -> str:
    columns = ("workload", "draft", "#held-out requests", "#prompts", f"#{found.static_version} accepts", "#it accepts",
               "#faster than static, 95 %")
    return table(columns, [[r.workload, r.draft_version, str(r.windows), str(r.prompts), f"{r.static_length:.2f}", f"{r.served_length:.2f}",
                            _span(r.speed, "{:.2f}", "x")] for r in found.replays])


def _how(found: Savings, untimed: int) -> str:
    costs = "; ".join(f"{length}: {cost.estimate:.2f} [{cost.low:.2f}, {cost.high:.2f}]" for length, cost, _ in found.costs)
    unjudged = [f"{1 - a.judged_share:.0%} of the served time against {a.name}" for a in found.against if 1 - a.judged_share > LEAST_SHARE]
    static = next((a for a in found.against if a.name == STATIC), None)
    told = ["Intervals are 95 %, by bootstrap. Seconds are those of one serving device in steps, prompts left out; a second of training "
            "counts as one of serving.",
            f"Against no speculation: measured step times, the machine's load divided out; a step costs, by draft length, {costs} times a "
            "step without a draft." if costs else "",
            f"Against the static draft: {found.static_version}, the first that was served, and each draft after it replayed on the same "
            "held-out requests that were captured of it, each moment by the nearest ones." if static else "",
            f"Left out, as nothing tells: {' and '.join(unjudged)}." if unjudged else "", untimed_in_words(untimed)]
    return note(" ".join(text for text in told if text))


def _span(value: Interval, form: str = "{:,.0f}", unit: str = "") -> str:
    return f"{form.format(value.estimate)}{unit} [{form.format(value.low)}, {form.format(value.high)}]"


def _net(value: Interval) -> Html | str:
    good = True if value.low > 0 else False if value.high < 0 else None
    text = _span(value, "{:+,.0f}")
    return text if good is None else Html(f'<span class="{"good" if good else "bad"}">{text}</span>')


def _signed(seconds: float) -> str:
    size, unit = next(((s, u) for s, u in ((3600, "h"), (60, "min")) if abs(seconds) >= 2 * s), (1, "s"))
    return f"{abs(seconds) / size:.1f} {unit} of serving {'saved' if seconds >= 0 else 'lost'}"
