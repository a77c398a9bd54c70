"""A report as one HTML file: inline CSS and SVG, no script, nothing loaded from anywhere. Knows what is shown, not where it comes from."""

from __future__ import annotations

import html
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from tide_pipeline.contracts import Deployment, DriftVerdict, GateVerdict
from tide_pipeline.provenance import write_atomic
from tide_pipeline.report.data import ReportData
from tide_pipeline.report.plots import time_plot, training_plot

TEMPLATE = Path(__file__).parent / "page.html"
DASH = "–"
FORMS = {"acceptance_length": "{:.2f}", "tokens_per_s": "{:,.0f}", "plain_tokens_per_s": "{:,.0f}", "speedup": "{:.2f}x",
         "speedup_fixed": "{:.2f}x", "prompts": "{:d}"}


def write_report(path: Path, data: ReportData) -> None:
    """Write the page, whole or not at all."""
    write_atomic(path, render(data).encode())


def render(data: ReportData) -> str:
    """The page's HTML."""
    sections = [_phases(data.phases), _section("Over time", _plot(time_plot(data))), _stages(data.stages_s), _verdicts(data.verdicts),
                _section("Training", _plot(training_plot(data.training))), _gates(data.gates),
                _deployments(data.deployments, data.versions), _facts(data.facts)]
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(data.title), headline=html.escape(data.headline or headline(data)), when=html.escape(_period(data)),
        body="\n".join(section for section in sections if section))


def headline(data: ReportData) -> str:
    """The page in one sentence."""
    worth = {str(phase["name"]): phase["speedup"] for phase in data.phases if "name" in phase and "speedup" in phase}
    if not {"healthy", "shifted", "adapted"} <= worth.keys():
        tokens = sum(b.tokens_per_s * b.seconds for b in data.series)
        versions = len({b.draft_version for b in data.series} - {""})
        return f"{tokens:,.0f} tokens served with {versions} draft version{'s' * (versions != 1)}"
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
    head = _head("phase", "text", "#prompts", "#acceptance length", "#tokens/s", "#without", "#adaptive", "#against none, 95 %", "#fixed 3")
    return _section("What speculation is worth", f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'
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
    return _section("The adaptation", f'<div class="stages">{"".join(rows)}</div>')


def _verdicts(verdicts: Sequence[DriftVerdict]) -> str:
    rows = [[v.workload, v.draft_version, _verdict("drifted" if v.drifted else "steady" if v.enough_data else "undecided", not v.drifted
             if v.enough_data else None), v.reason] for v in verdicts]
    return _table("Drift", ("workload", "draft", "verdict", "evidence"), rows)


def _gates(gates: Sequence[GateVerdict]) -> str:
    rows = []
    for verdict in gates:
        against = f"{verdict.challenger} against {verdict.champion or 'no speculation'}"
        for i, (name, door) in enumerate(verdict.doors.items()):
            passed = bool(door.get("passed"))
            rows.append([against if i == 0 else "", name, _verdict("passed" if passed else "refused", passed), str(door.get("reason", ""))])
    return _table("Gate", ("challenger", "door", "verdict", "numbers"), rows)


def _deployments(deployments: Sequence[Deployment], versions: Mapping[str, str]) -> str:
    rows = []
    for d in deployments:
        groups = {group: ", ".join(f"{tag} → {versions.get(build, build)}" for tag, build in drafts.items())
                  for group, drafts in d.groups.items()}
        served = "; ".join(f"{group}: {drafts}" for group, drafts in groups.items()) if len(groups) > 1 else "".join(groups.values())
        rows.append([str(d.n), time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(d.created_at)), d.stage, served, d.who, d.reason])
    return _table("Deployments", ("#n", "UTC", "stage", "drafts", "by", "reason"), rows)


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>" for key, value in facts.items())
    return _section("Machine and settings", f"<dl>{rows}</dl>") if rows else ""


class _Html(str):
    """Text that is HTML already."""


def _verdict(word: str, good: bool | None) -> _Html:
    return _Html(word if good is None else f'<span class="{"good" if good else "bad"}">{word}</span>')


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    number = [column.startswith("#") for column in columns]
    lines = []
    for row in rows:
        cells = [cell if isinstance(cell, _Html) else html.escape(cell) for cell in row]
        lines.append("<tr>" + "".join(f'<td{" class=number" * n}>{cell}</td>' for cell, n in zip(cells, number, strict=True)) + "</tr>")
    return _section(title, f'<div class="wide"><table>{_head(*columns)}{"".join(lines)}</table></div>')


def _head(*columns: str) -> str:
    """A header row; a column that starts with # holds numbers."""
    cells = "".join(f'<th class="number">{c[1:]}</th>' if c.startswith("#") else f"<th>{c}</th>" for c in columns)
    return f"<thead><tr>{cells}</tr></thead>"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _plot(svg: str) -> str:
    return f'<div class="wide"><div class="plot">{svg}</div></div>' if svg else ""


def _number(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    return DASH if value is None else FORMS[key].format(value)


def _period(data: ReportData) -> str:
    if not data.series and data.since is None:
        return ""
    since = data.since if data.since is not None else min(b.time for b in data.series)
    until = data.until if data.until is not None else max((b.time + b.seconds for b in data.series), default=since)
    begin, end = (time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(t)) for t in (since, until))
    size, unit = next(((s, u) for s, u in ((86_400, "days"), (3600, "hours"), (60, "minutes")) if until - since >= 2 * s), (1, "seconds"))
    return f"{begin} to {end} UTC, {(until - since) / size:.1f} {unit}"
