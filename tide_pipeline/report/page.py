"""A report as one HTML file: inline CSS and SVG, no script, nothing loaded from anywhere. Knows what is shown, not where it comes from."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from tide_pipeline.contracts import Deployment, DriftVerdict, GateVerdict
from tide_pipeline.gate.judge import ELSEWHERE
from tide_pipeline.provenance import write_atomic
from tide_pipeline.report.data import Drift, ReportData, Trained
from tide_pipeline.report.parts import DASH, clock, head, note, plot_box, section, table, verdict
from tide_pipeline.report.plots import time_plot, training_plot
from tide_pipeline.report.savings_page import in_words, savings_section, untimed_in_words

TEMPLATE = Path(__file__).parent / "page.html"
FORMS = {"acceptance_length": "{:.2f}", "tokens_per_s": "{:,.0f}", "plain_tokens_per_s": "{:,.0f}", "speedup": "{:.2f}x",
         "speedup_fixed": "{:.2f}x", "prompts": "{:d}"}


def write_report(path: Path, data: ReportData) -> None:
    """Write the page, whole or not at all."""
    write_atomic(path, render(data).encode())


def render(data: ReportData) -> str:
    """The page's HTML."""
    trainings = plot_box(training_plot(data.training)) + _trainings(data.trainings, data.untimed_trainings)
    sections = [_phases(data.phases), savings_section(data.savings, *_ends(data), data.untimed_trainings),
                section("Over time", plot_box(time_plot(data))), _stages(data.stages_s), _drifts(data.drifts, data.verdicts),
                section("Training", trainings), _gates(data.gates), _deployments(data.deployments, data.versions), _facts(data.facts)]
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(data.title), headline=html.escape(data.headline or headline(data)), when=html.escape(_period(data)),
        body="\n".join(part for part in sections if part))


def headline(data: ReportData) -> str:
    """The page in one sentence."""
    worth = {str(phase["name"]): phase["speedup"] for phase in data.phases if "name" in phase and "speedup" in phase}
    if not {"healthy", "shifted", "adapted"} <= worth.keys():
        tokens = sum(b.tokens_per_s * b.seconds for b in data.series)
        versions = len({b.draft_version for b in data.series} - {""})
        served = f"{tokens:,.0f} tokens served with {versions} draft version{'s' * (versions != 1)}"
        return served + (f"; {saved}" if (saved := in_words(data.savings)) else "")
    took = f", {sum(data.stages_s.values()):.0f} s after it" if data.stages_s else ""
    return (f"Speculation was worth {worth['healthy']:.2f}x before the traffic shifted, {worth['shifted']:.2f}x after the shift with the "
            f"old draft, and {worth['adapted']:.2f}x with a draft trained on the new traffic{took}.")


def _phases(phases: Sequence[Mapping[str, Any]]) -> str:
    if not phases:
        return ""
    everything = [row for phase in phases for row in (phase, *phase.get("splits", ()))]
    ends = [row[key] for row in everything for key in ("speedup", "speedup_low", "speedup_high", "speedup_fixed") if row.get(key)]
    scale = min([*ends, 0.9]), max([*ends, 1.2])
    rows = []
    for phase in phases:
        rows.append(_phase_row(phase, str(phase.get("name", "")), str(phase.get("text", "")), "main", scale))
        rows += [_phase_row(split, str(split.get("name", "")), "", "split", scale) for split in phase.get("splits", ())
                 if split.get("name") != phase.get("text")]
    columns = head("phase", "text", "#prompts", "#acceptance length", "#tokens/s", "#without", "#adaptive", "#against none, 95 %",
                   "#fixed 3")
    return section("What speculation is worth", f'<div class="wide"><table>{columns}{"".join(rows)}</table></div>'
                   '<p class="note">One request at a time, each prompt with and without speculation in turn in the same engine. Adaptive: '
                   'the engine chooses the draft length; fixed 3: always three draft tokens (hollow mark). Acceptance length at fixed 3, '
                   'bonus token included.</p>')


def _phase_row(row: Mapping[str, Any], name: str, text: str, kind: str, scale: tuple[float, float]) -> str:
    cells = [_number(row, key) for key in ("prompts", "acceptance_length", "tokens_per_s", "plain_tokens_per_s", "speedup")]
    numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
    return (f'<tr class="{kind}"><td>{html.escape(name)}</td><td>{html.escape(text)}</td>{numbers}'
            f'<td class="number">{_interval(row, scale)}</td><td class="number">{_number(row, "speedup_fixed")}</td></tr>')


def _interval(row: Mapping[str, Any], scale: tuple[float, float]) -> str:
    """The speed-up's interval on a line with 1x marked, and the fixed length's point."""
    speedup, low, high, fixed = (row.get(key) for key in ("speedup", "speedup_low", "speedup_high", "speedup_fixed"))
    if speedup is None:
        return DASH
    least, most = scale

    def x(value: float) -> float:
        return 6 + 178 * (value - least) / (most - least)

    bar = f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="10" y2="10" stroke="var(--series-0)" stroke-width="3"/>' if low and high else ""
    ring = f'<circle cx="{x(fixed):.1f}" cy="10" r="3.5" fill="none" stroke="var(--series-1)" stroke-width="1.5"/>' if fixed else ""
    said = f"{low:.2f}x to {high:.2f}x" if low and high else f"{speedup:.2f}x"
    return (f'<svg class="interval" viewBox="0 0 190 20" role="img" aria-label="{said}"><title>{said}</title>'
            f'<line x1="{x(1):.1f}" x2="{x(1):.1f}" y1="1" y2="19" stroke="var(--muted)" stroke-width="1"/>'
            f'{bar}{ring}<circle cx="{x(speedup):.1f}" cy="10" r="4" fill="var(--series-0)"/></svg>')


def _stages(stages_s: Mapping[str, float]) -> str:
    """Seconds by stage, one after the other."""
    total = sum(stages_s.values())
    if total <= 0:
        return ""
    rows, begin = [], 0.0
    for name, seconds in stages_s.items():
        place = f"margin-left:{100 * begin / total:.2f}%;width:{100 * seconds / total:.2f}%"
        rows.append(f'<span>{html.escape(name)}</span><span><i style="{place}"></i></span><b>{seconds:.1f} s</b>')
        begin += seconds
    rows.append(f'<span class="sum">from shift to new draft</span><span class="sum"></span><b class="sum">{total:.1f} s</b>')
    return section("The adaptation", f'<div class="stages">{"".join(rows)}</div>')


def _drifts(drifts: Sequence[Drift], verdicts: Sequence[DriftVerdict]) -> str:
    """What trainings were launched for, and how each workload is judged at the end of the period."""
    rows = [[clock(d.at), d.workload, d.draft_version, verdict("drifted", False), d.reason] for d in drifts]
    for v in verdicts:
        word = "drifted" if v.drifted else "steady" if v.enough_data else "undecided"
        rows.append(["at the end", v.workload, v.draft_version, verdict(word, not v.drifted if v.enough_data else None), v.reason])
    return section("Drift", table(("UTC", "workload", "draft", "verdict", "evidence"), rows))


def _trainings(trainings: Sequence[Trained], untimed: int) -> str:
    rows = [[t.draft_version or f"none: {t.without_draft}", clock(t.began), f"{t.seconds:.0f}", f"{t.rows:,}" if t.draft_version else DASH,
             _length(t.start_length), _length(t.length)] for t in trainings]
    lost = [t.seconds for t in trainings if not t.draft_version]
    told = [f"{sum(t.seconds for t in trainings):,.0f} s of training in all" if len(rows) > 1 else "",
            f"{sum(lost):,.0f} s in {len(lost)} without a draft, counted up to the last word of each" if lost else ""]
    sums = ", ".join(text for text in told if text)
    return table(("draft", "UTC", "#seconds", "#token rows", "#acceptance before", "#after, held-out requests"), rows) + (
        note(" ".join(text for text in (f"{sums}." if sums else "", untimed_in_words(untimed)) if text)) if sums or untimed else "")


def _gates(gates: Sequence[GateVerdict]) -> str:
    rows = []
    for found in gates:
        against = f"{found.challenger} against {found.champion or 'no speculation'}"
        for i, (name, door) in enumerate(found.doors.items()):
            passed = bool(door.get("passed"))
            state = ELSEWHERE.get(door.get("measured_on", ""), "passed" if passed else "refused")
            rows.append([against if i == 0 else "", name, verdict(state, passed), str(door.get("reason", ""))])
    return section("Gate", table(("challenger", "door", "verdict", "numbers"), rows))


def _deployments(deployments: Sequence[Deployment], versions: Mapping[str, str]) -> str:
    rows = []
    for d in deployments:
        groups = {group: ", ".join(f"{tag} → {versions.get(build, build)}" for tag, build in drafts.items())
                  for group, drafts in d.groups.items()}
        served = "; ".join(f"{group}: {drafts}" for group, drafts in groups.items()) if len(groups) > 1 else "".join(groups.values())
        rows.append([str(d.n), clock(d.created_at), d.stage, served, d.who, d.reason])
    return section("Deployments", table(("#n", "UTC", "stage", "drafts", "by", "reason"), rows))


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>" for key, value in facts.items())
    return section("Machine and settings", f"<dl>{rows}</dl>") if rows else ""


def _length(value: float) -> str:
    return f"{value:.2f}" if value else DASH


def _number(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    return DASH if value is None else FORMS[key].format(value)


def _period(data: ReportData) -> str:
    if not data.series and data.since is None:
        return ""
    since, until = _ends(data)
    size, unit = next(((s, u) for s, u in ((86_400, "days"), (3600, "hours"), (60, "minutes")) if until - since >= 2 * s), (1, "seconds"))
    return f"{clock(since)} to {clock(until)} UTC, {(until - since) / size:.1f} {unit}"


def _ends(data: ReportData) -> tuple[float, float]:
    """Of the period as it was asked for, else of what is shown."""
    since = data.since if data.since is not None else min((b.time for b in data.series), default=0.0)
    return since, data.until if data.until is not None else max((b.time + b.seconds for b in data.series), default=since)
