"""The whole loop on a short budget: real Triton, MLflow, Dagster, training, rollout. Minutes on two cores."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.e2e


def test_demo_closes_the_loop_and_leaves_nothing_behind(tmp_path: Path) -> None:
    figures, report, state = tmp_path / "demo.json", tmp_path / "report.html", tmp_path / "state"
    command = [str(Path(sys.executable).with_name("tide")), "--state", str(state), "demo", "--budget", "short", "--json", str(figures),
               "--report", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    said = f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert done.returncode == 0, said

    found = json.loads(figures.read_text())
    assert found["closed"], said
    assert found["failed_requests"] == 0
    assert found["collected_tokens"] > 0
    phases = {phase["name"]: phase for phase in found["phases"]}
    assert list(phases) == ["healthy", "shifted", "adapted"]
    assert phases["shifted"]["acceptance_length"] < phases["healthy"]["acceptance_length"]
    assert phases["adapted"]["acceptance_length"] > phases["shifted"]["acceptance_length"]
    assert {"train", "register", "build", "gate", "roll out"} <= set(found["adaptation_s"])
    assert "<svg" in report.read_text()
    left = [p.pid for p in psutil.process_iter(["cmdline"]) if str(state) in " ".join(p.info["cmdline"] or [])]
    assert not left, f"processes {left} were left behind"
