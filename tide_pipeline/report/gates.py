"""Gate reports of a period, those of builds that have gone too. Reads `reports/gate/`; knows no lake.

A report names its build, not its target: one is another target's where a build or the record of a training says so.
"""

from __future__ import annotations

from collections.abc import Sequence

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import GateVerdict
from tide_pipeline.errors import GateNotPassed
from tide_pipeline.gate.run import load_report
from tide_pipeline.provenance import read_record


def gate_verdicts(config: TideConfig) -> list[tuple[float, str, GateVerdict]]:
    """When it was written (Unix seconds), of which build, the verdict; oldest first. Reports that can't be read are passed over."""
    others = _builds_of_others(config)
    found = []
    for file in (config.state.reports / "gate").glob("*.json"):
        if file.stem in others:
            continue
        try:
            found.append((file.stat().st_mtime, file.stem, load_report(config, file.stem).verdict))
        except (OSError, GateNotPassed):
            continue
    return sorted(found, key=lambda report: report[:2])


def within(verdicts: Sequence[tuple[float, str, GateVerdict]], since: float, until: float) -> list[GateVerdict]:
    return [verdict for written, _, verdict in verdicts if since <= written <= until]


def _builds_of_others(config: TideConfig) -> set[str]:
    there = {file.parent.name: file.parent.parent.name for file in config.state.builds.glob("*/*/build.json")}
    gone = {str(record["build_id"]): str(record["target"]) for file in config.state.training.glob("*/build.json")
            if {"build_id", "target"} <= (record := read_record(file)).keys()}
    return {build_id for build_id, target in {**gone, **there}.items() if target != config.target}
