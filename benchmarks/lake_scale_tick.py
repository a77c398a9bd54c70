"""What a code server does of a tick: evaluates the real drift sensor, when lake_scale_ticks.py asks, and tells what that took.

    DAGSTER_HOME=... python benchmarks/lake_scale_tick.py

A line of JSON comes in for each tick: `settings`, a file; `cursor`; `import`, modules to load before it. One goes out.
Like a code server, it has loaded the definitions and nothing else when the first tick comes, and opens Dagster's instance anew in every
tick. It imports nothing of the benchmarks.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any

import dagster as dg

from tide_pipeline.definitions import defs
from tide_pipeline.defs.drift_sensor import drift_sensor
from tide_pipeline.defs.resources import TideResource


def tick(ref: Any, tide: TideResource, cursor: str) -> dict[str, Any]:
    wall, cpu, modules = time.perf_counter(), time.process_time(), set(sys.modules)
    with dg.build_sensor_context(instance_ref=ref, cursor=cursor, resources={"tide": tide}) as context:
        result = drift_sensor(context)
    wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    assert isinstance(result, dg.SensorResult)
    return {"wall_s": wall_s, "cpu_s": cpu_s, "cursor": result.cursor, "asked": len(result.run_requests or []),
            "observed": len(result.asset_events), "says": (result.skip_reason.skip_message or "") if result.skip_reason else "",
            "imported": sorted(name for name in set(sys.modules) - modules if name.startswith("tide_pipeline."))}


def main() -> None:
    defs().get_repository_def()
    with dg.DagsterInstance.get() as instance:
        ref = instance.get_ref()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked, begin = json.loads(line), time.perf_counter()
        for name in asked["import"]:
            importlib.import_module(name)
        import_s = time.perf_counter() - begin
        print(json.dumps(tick(ref, TideResource(config_file=asked["settings"]), asked["cursor"]) | {"import_s": import_s}), flush=True)


if __name__ == "__main__":
    main()
