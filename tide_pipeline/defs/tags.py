"""Tags of runs: what a run is for, and what Dagster reads of it. Knows names only."""

TARGET, WORKLOAD, REASON, EPISODE, ATTEMPT = "tide/target", "tide/workload", "tide/reason", "tide/episode", "tide/attempt"
SINCE, UNTIL = "tide/since", "tide/until"  # of a draft over a past window, UTC
DRIFTED_AT = "tide/drifted_at"             # Unix seconds of the verdict
PASSED = "tide/passed"                     # id of the build that passed the gate in this run, whatever became of it then
AFTER = "tide/after"                       # number of the deployment that stood when a rollout by hand began: its own came after it
BY_HAND = "launched by hand"               # the reason where nobody gave another
WORKER = "tide/worker"                     # host name and process id of what executes the run, said by itself
MAX_RUNTIME = "dagster/max_runtime"        # seconds; run monitoring fails a run that is still going then
RETRY = "dagster/retry_number"             # of a run that Dagster began for one whose worker was killed; a person's re-execution has none
