"""What Dagster loads: the names and edges that people click on, and how little it costs to load them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg

from tide_pipeline.definitions import defs

GOLDEN = Path(__file__).parent.parent / "golden" / "definitions.json"
HEAVY = ("torch", "mlflow", "duckdb")
LOAD = f"""
import sys, time
import tide_pipeline.definitions as module
module.defs().get_repository_def()
print([name for name in {HEAVY!r} if name in sys.modules], time.process_time())
"""


def _snapshot() -> dict[str, Any]:
    repository = defs().get_repository_def()
    graph = repository.asset_graph
    nodes = {key.to_user_string(): graph.get(key) for key in graph.get_all_asset_keys()}
    jobs = {job.name: job for job in repository.get_all_jobs() if not job.name.startswith("__")}
    return {
        "assets": {name: {"deps": sorted(parent.to_user_string() for parent in node.parent_keys), "group": node.group_name,
                          "kinds": sorted(node.kinds), "pool": node.assets_def.op.pool if node.is_executable else None}
                   for name, node in sorted(nodes.items())},
        "checks": {key.to_user_string(): {"blocking": graph.get(key).blocking} for key in sorted(graph.asset_check_keys, key=str)},
        "jobs": {name: {"ops": sorted(node.name for node in job.graph.nodes), "executor": job.executor_def.name, "tags": dict(job.tags)}
                 for name, job in sorted(jobs.items())},
        "schedules": {schedule.name: {"cron": schedule.cron_schedule, "starts": schedule.default_status.value,
                                      "launches": schedule.job_name}
                      for schedule in sorted(repository.schedule_defs, key=lambda schedule: schedule.name)},
        "sensors": {sensor.name: {"every_s": sensor.minimum_interval_seconds, "starts": sensor.default_status.value,
                                  "launches": [target.job_name for target in sensor.targets]}
                    for sensor in sorted(repository.sensor_defs, key=lambda sensor: sensor.name)},
    }


def test_the_definitions_are_these() -> None:
    """To change them on purpose, paste the left side of the difference into the golden file."""
    assert _snapshot() == json.loads(GOLDEN.read_text())


def test_every_asset_says_what_it_is_and_whose() -> None:
    for spec in defs().resolve_all_asset_specs():
        assert spec.description and spec.group_name and spec.owners and spec.kinds, spec.key


def test_loading_is_cheap_and_reads_no_settings() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", LOAD], capture_output=True, text=True, timeout=120, check=False,
                          env={"TIDE_CONFIG": "/there/is/no/such.toml"})
    assert done.returncode == 0, done.stderr[-2000:]
    heavy, _, cpu_s = done.stdout.strip().rpartition(" ")
    assert heavy == "[]"
    assert float(cpu_s) < 3.0


def test_adapt_draft_needs_no_config() -> None:
    job = defs().resolve_job_def("adapt_draft")
    assert dg.validate_run_config(job) is not None
