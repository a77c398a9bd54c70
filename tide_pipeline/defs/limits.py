"""How long a run may take before it counts as hung, as a tag that Dagster reads. Pure: settings in, seconds out."""

from tide_pipeline.config import RolloutSettings, TideConfig
from tide_pipeline.defs.tags import MAX_RUNTIME

AWAY_TRIES, AWAY_S = 40, 15.0              # MLflow or the lake may be away for ten minutes before a draft is given up
SILENT_S = AWAY_TRIES * 105.0              # more, once, where it hangs: each try has its client's patience, three requests of 30 s
AWAY_STEPS = 4                             # that wait for one of them: to train, to register, to fetch, to judge
REST_S = 600.0                             # processes that start, the lake, registering, the build, the gate
BUDGETS = 4                                # a trainer that was killed goes on; and a budget begins only once its data is read


def runtime_tags(config: TideConfig) -> dict[str, str]:
    """Of a run of adapt_draft. Without a budget of time nothing is known: there run monitoring's own limit counts (dagster.yaml)."""
    budget_s = config.training.time_budget_s
    if budget_s <= 0:
        return {}
    return {MAX_RUNTIME: str(int(REST_S + BUDGETS * budget_s + waits_s(AWAY_STEPS) + longest_rollout_s(config.rollout)))}


def challenger_tags(config: TideConfig) -> dict[str, str]:
    """Of a run of judge_challenger: it waits to fetch and to judge, trains nothing, and may roll out."""
    return {MAX_RUNTIME: str(int(REST_S + waits_s(2) + longest_rollout_s(config.rollout)))}


def rollout_tags(config: TideConfig) -> dict[str, str]:
    """Of a run that only rolls out: approve_rollout, promote."""
    return {MAX_RUNTIME: str(int(REST_S + longest_rollout_s(config.rollout)))}


def waits_s(steps: int) -> float:
    """That each of so many steps may wait for what refuses, and one for what is silent."""
    return steps * AWAY_TRIES * AWAY_S + SILENT_S


def longest_rollout_s(settings: RolloutSettings) -> float:
    """Until the last replica serves the draft. A person may pause a rollout for longer: then it outlives its run."""
    waits_s = settings.step_s + settings.serve_timeout_s
    return max(settings.bake_s, settings.max_bake_s) + settings.serve_timeout_s + (len(settings.steps) + 1) * waits_s
