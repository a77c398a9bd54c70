"""Give back what a killed run worker still holds. The default run launcher records a worker's pid and never looks again."""

from collections.abc import Sequence

import dagster as dg

from tide_pipeline.defs.whereabouts import is_of_this_machine, may_be_of_this_machine

IN_PROGRESS = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]
STARTED_BY_LAUNCHER = "Started process for run"
WORKER = "from multiprocessing.spawn import"           # of a run worker's command line


@dg.sensor(name="janitor_sensor", minimum_interval_seconds=15, default_status=dg.DefaultSensorStatus.RUNNING,
           description="Fails runs whose worker process is gone, so that their place in a pool comes back.")
def janitor_sensor(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    in_progress = context.instance.get_runs(dg.RunsFilter(statuses=IN_PROGRESS))
    lost = fail_lost_runs(context.instance, in_progress)
    failed = f", failed: {', '.join(lost)}" if lost else ""
    return dg.SkipReason(f"{len(in_progress)} runs in progress, {len(lost)} without a worker{failed}")


def fail_lost_runs(instance: dg.DagsterInstance, runs: Sequence[dg.DagsterRun]) -> list[str]:
    """Ids of the runs that were failed."""
    lost = []
    for run in runs:
        worker = worker_of(instance, run)
        if worker is None or is_alive(*worker):
            continue
        now = instance.get_run_by_id(run.run_id)           # it may have ended between the list and the look
        if now is None or now.status not in IN_PROGRESS:
            continue
        instance.report_run_failed(now, f"its worker process {worker[0]} is gone: re-execute from the failed step")
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
        lost.append(run.run_id)
    return lost


def worker_of(instance: dg.DagsterInstance, run: dg.DagsterRun) -> tuple[int, float] | None:
    """Process id and Unix time of its last start; None for a run that was not launched on this machine."""
    if not may_be_of_this_machine(run):
        return None
    for event in reversed(instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ENGINE_EVENT)):
        told = event.get_dagster_event()
        if (told.message or "").startswith(STARTED_BY_LAUNCHER):       # executors tell of other processes, which end before the run
            pid = int(str(told.engine_event_data.metadata["pid"].value))
            return (pid, event.timestamp) if is_of_this_machine(run, pid) else None
    return None


def is_alive(pid: int, since: float) -> bool:
    """Whether a process with this id runs that was there at `since`: ids are used again.

    When a clock was set, the time says nothing: what looks like a run worker is taken for one. `dagster/max_runtime` is the backstop.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return bool(process.create_time() <= since + 1.0 or WORKER in " ".join(process.cmdline()))
    except psutil.NoSuchProcess:
        return False
