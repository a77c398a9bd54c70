"""What Dagster loads: the names and edges that people click on, and how little it costs to load them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.freshness import TimeWindowFreshnessPolicy

from tide_pipeline.definitions import defs
from tide_pipeline.defs.keys import POOLS, PREFIX, pool_of

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
                          "kinds": sorted(node.kinds), "owners": sorted(node.owners), "tags": _own(node.tags),
                          "partitions": _partitions(node.partitions_def), "fresh_for_hours": _fresh_for(node.freshness_policy)}
                   for name, node in sorted(nodes.items())},
        "checks": {key.to_user_string(): {"blocking": graph.get(key).blocking} for key in sorted(graph.asset_check_keys, key=str)},
        "jobs": {name: {"ops": {op.name: {"pool": op.pool, "config": _fields(op)} for op in _ops(job)},
                        "executor": job.executor_def.name, "tags": dict(job.tags), "partitions": _partitions(job.partitions_def)}
                 for name, job in sorted(jobs.items())},
        "resources": sorted(repository.get_top_level_resources()),
        "schedules": {schedule.name: {"cron": schedule.cron_schedule, "starts": schedule.default_status.value,
                                      "timezone": schedule.execution_timezone, "launches": schedule.job_name, "tags": _own(schedule.tags)}
                      for schedule in sorted(repository.schedule_defs, key=lambda schedule: schedule.name)},
        "sensors": {sensor.name: {"every_s": sensor.minimum_interval_seconds, "starts": sensor.default_status.value,
                                  "launches": [target.job_name for target in sensor.targets]}
                    for sensor in sorted(repository.sensor_defs, key=lambda sensor: sensor.name)},
    }


def _own(tags: Mapping[str, str]) -> dict[str, str]:
    """Without those that Dagster makes of other arguments."""
    return {name: value for name, value in tags.items() if not name.startswith("dagster/")}


def _partitions(found: dg.PartitionsDefinition[str] | None) -> str | None:
    if found is None:
        return None
    assert isinstance(found, dg.TimeWindowPartitionsDefinition)
    return f"{found.cron_schedule} {found.timezone} from {found.start:%Y-%m-%d-%H:%M}, {found.end_offset} beyond the last whole one"


def _fresh_for(found: dg.FreshnessPolicy | None) -> list[float] | None:
    """Hours until a warning, and until it counts as stale."""
    if found is None:
        return None
    assert isinstance(found, TimeWindowFreshnessPolicy) and found.warn_window is not None
    return [window.to_timedelta().total_seconds() / 3600 for window in (found.warn_window, found.fail_window)]


def _ops(job: dg.JobDefinition) -> list[dg.OpDefinition]:
    return sorted((op for op in job.graph.node_defs if isinstance(op, dg.OpDefinition)), key=lambda op: op.name)


def _fields(op: dg.OpDefinition) -> dict[str, Any]:
    """What can be filled in, and what it is otherwise."""
    fields = getattr(op.config_schema.config_type, "fields", None) or {}
    return {name: field.default_value if field.default_provided else "to be given" for name, field in sorted(fields.items())}


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


def _snapshot_of_a_code_server(**environment: str) -> dict[str, Any]:
    """As a process of its own: names of pools are made when the assets' modules are imported."""
    shown = "import json; from tests.defs.test_definitions import _snapshot; print(json.dumps(_snapshot()))"
    done = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, timeout=120, check=False,
                          cwd=GOLDEN.parent.parent.parent, env={"TIDE_CONFIG": "/there/is/no/such.toml", **environment})
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout))


def _pools(snapshot: dict[str, Any]) -> set[str]:
    return {op["pool"] for job in snapshot["jobs"].values() for op in job["ops"].values() if op["pool"]}


def _without_pools(jobs: dict[str, Any]) -> dict[str, Any]:
    return {name: {**job, "ops": {op: {**facts, "pool": None} for op, facts in job["ops"].items()}} for name, job in jobs.items()}


def test_a_second_target_shares_no_asset_and_no_pool_with_the_first() -> None:
    """One Dagster, a code location for each target: the same jobs; assets and pools under the target's name."""
    plain, second = _snapshot(), _snapshot_of_a_code_server(**{PREFIX: "qwen3-8b"})
    before = "qwen3-8b/{}".format
    assert second["assets"].keys() == {before(name) for name in plain["assets"]}
    assert all(facts["deps"] == [before(name) for name in plain["assets"][key.rpartition("/")[2]]["deps"]]
               for key, facts in second["assets"].items())
    assert second["checks"].keys() == {before(name) for name in plain["checks"]}
    assert _pools(plain) == {"train_gpu", "serve_gpu"} and _pools(second) == {"qwen3-8b.train_gpu", "qwen3-8b.serve_gpu"}
    assert _without_pools(second["jobs"]) == _without_pools(plain["jobs"])
    assert {name: second[name] for name in ("sensors", "schedules", "resources")} == {
        name: plain[name] for name in ("sensors", "schedules", "resources")}


@pytest.mark.parametrize(("environment", "name"), [
    ({}, "train_gpu"), ({PREFIX: "qwen3-8b"}, "qwen3-8b.train_gpu"), ({PREFIX: "qwen3-8b", POOLS: "gpu-0"}, "gpu-0.train_gpu"),
    ({PREFIX: "qwen3-8b", POOLS: ""}, "train_gpu")])
def test_targets_on_one_gpu_may_share_pools(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], name: str) -> None:
    for variable in (PREFIX, POOLS):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert pool_of("train_gpu") == name


def test_adapt_draft_needs_no_config() -> None:
    job = defs().resolve_job_def("adapt_draft")
    assert dg.validate_run_config(job) is not None
