"""How many hours adaptations have taken lately. Knows Dagster's run records; decides by the settings alone."""

from datetime import UTC, datetime

import dagster as dg

from tide_pipeline.config import TideConfig
from tide_pipeline.defs.jobs import adapt_draft
from tide_pipeline.defs.tags import TARGET

DAY_S = 86_400.0
MOST_RUNS = 1_000                  # looked at; a day has no room for more adaptations


def why_too_much(instance: dg.DagsterInstance, config: TideConfig, now: float) -> str:
    """What keeps the budget of training hours from paying for one more adaptation; "" when nothing does."""
    budget = config.drift.training_hours_per_day
    if budget <= 0:
        return ""
    spent = hours_spent(instance, config.target, now)
    if spent < budget:
        return ""
    return (f"adaptations of {config.target} took {spent:.2f} hours in the last 24, drift.training_hours_per_day is {budget:g}: "
            "wait until the oldest is a day old, or raise it")


def hours_spent(instance: dg.DagsterInstance, target: str, now: float) -> float:
    """Of adapt_draft runs that moved in the last 24 hours, those by hand and those that failed included; from their start."""
    since = now - DAY_S
    wanted = dg.RunsFilter(job_name=adapt_draft.name, updated_after=datetime.fromtimestamp(since, UTC))
    seconds = 0.0
    for record in instance.get_run_records(wanted, limit=MOST_RUNS):
        if record.start_time is not None and record.dagster_run.tags.get(TARGET, target) == target:
            seconds += max(0.0, min(record.end_time or now, now) - max(record.start_time, since))
    return seconds / 3600
