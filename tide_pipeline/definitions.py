"""Everything that Dagster sees, in the order of the loop. Loading it reads no settings and imports no torch, MLflow or DuckDB."""

import dagster as dg

from tide_pipeline.defs import draft, promotion
from tide_pipeline.defs.drift_sensor import drift_sensor
from tide_pipeline.defs.hours import lake_sensor
from tide_pipeline.defs.janitor import janitor_sensor
from tide_pipeline.defs.jobs import adapt_draft, approve_rollout, judge_challenger, observe_lake, promote, rollback
from tide_pipeline.defs.keys import prefix, prefixed
from tide_pipeline.defs.lake import acceptance_log, signal_windows
from tide_pipeline.defs.maintenance import JOBS, SCHEDULES
from tide_pipeline.defs.resources import TideResource
from tide_pipeline.defs.rollout_sensor import alias_sensor, rollout_sensor


@dg.definitions
def defs() -> dg.Definitions:
    return dg.Definitions(
        **prefixed(prefix(), [draft, promotion], [acceptance_log, signal_windows]),
        jobs=[adapt_draft, judge_challenger, promote, approve_rollout, rollback, observe_lake, *JOBS],
        schedules=SCHEDULES,
        sensors=[drift_sensor, lake_sensor, rollout_sensor, alias_sensor, janitor_sensor],
        resources={"tide": TideResource(), "trainer": dg.PipesSubprocessClient()},
        executor=dg.in_process_executor,       # steps are short; what is long or uses a GPU is a process of its own
    )
