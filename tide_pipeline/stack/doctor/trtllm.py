"""Findings about a TensorRT-LLM: the installed one, or a folder with NVIDIA's sources. What is looked for stands in the table of facts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tide_pipeline.engine.trtllm.facts import Loss
from tide_pipeline.engine.trtllm.source_check import Checked, SourceReport, check_installed, check_source
from tide_pipeline.stack.doctor.finding import Finding, State

GROUP = "TensorRT-LLM"
# What a false fact means: capture is not fatal to serving, but without it there is nothing to learn from.
MEANS: dict[Loss, tuple[State, str]] = {
    "fatal": ("fail", "the adapter does not start"),
    "capture": ("fail", "it serves, but captures no hidden states"),
    "metric": ("warn", "it serves, one metric is missing"),
    "draft length": ("warn", "the draft length follows the schedule alone"),
    "in-place draft": ("warn", "a new draft goes in with a new replica, not in place"),
}
ADVICE = "correct facts/{line}.toml and what uses it, or serve another version of the line"


def check_trtllm(source: Path | None) -> Iterator[Finding]:
    report = check_source(source) if source is not None else check_installed()
    if report is None:
        yield Finding(GROUP, "ok", "not installed in this Python, so there is nothing to check; --trtllm-source DIR checks a folder")
        return
    yield Finding(f"{GROUP}: version", "ok", f"{report.version}, held against the facts of line {report.line}")
    yield from (_finding(check, report) for check in report.checks)


def _finding(check: Checked, report: SourceReport) -> Finding:
    name = f"{GROUP}: {check.fact.name}"
    if check.is_true:
        return Finding(name, "ok", f"{check.fact.access}; {check.fact.use}")
    state, meaning = MEANS[check.fact.loss]
    return Finding(name, state, "; ".join(check.wrong), f"{meaning}: {ADVICE.format(line=report.line)}")
