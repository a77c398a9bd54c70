"""Everything that Dagster sees, in the order of the loop. Loading it reads no settings and imports no torch, MLflow or DuckDB."""

import dagster as dg

from tide_pipeline.defs.draft import draft_checkpoint, draft_engine, registered_draft
from tide_pipeline.defs.drift_sensor import drift_sensor
from tide_pipeline.defs.janitor import janitor_sensor
from tide_pipeline.defs.jobs import adapt_draft, observe_lake, rollback
from tide_pipeline.defs.lake import acceptance_log, signal_windows
from tide_pipeline.defs.maintenance import JOBS, SCHEDULES
from tide_pipeline.defs.promotion import benchmark_report, challenger_beats_champion, live_draft
from tide_pipeline.defs.resources import TideResource


@dg.definitions
def defs() -> dg.Definitions:
    return dg.Definitions(
        assets=[acceptance_log, signal_windows, draft_checkpoint, registered_draft, draft_engine, benchmark_report, live_draft],
        asset_checks=[challenger_beats_champion],
        jobs=[adapt_draft, rollback, observe_lake, *JOBS],
        schedules=SCHEDULES,
        sensors=[drift_sensor, janitor_sensor],
        resources={"tide": TideResource(), "trainer": dg.PipesSubprocessClient()},
        executor=dg.in_process_executor,       # steps are short; what is long or uses a GPU is a process of its own
    )
