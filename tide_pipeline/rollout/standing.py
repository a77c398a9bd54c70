"""Whether a verdict still stands: a draft that passed the gate may have been taken back since. Knows the gate's report and the record."""

from __future__ import annotations

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import EngineBuild
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.errors import RolloutRefused
from tide_pipeline.gate.run import load_report, report_file
from tide_pipeline.rollout.history import taken_back


def refuse_if_taken_back(config: TideConfig, build: EngineBuild, workload: str) -> None:
    """A run that is run again comes with the verdict that it had: what live traffic or a person said after that counts more.

    Raises RolloutRefused, and GateNotPassed without a report.
    """
    judged_on = load_report(config, build.build_id).workload
    judged_at = report_file(config, build.build_id).stat().st_mtime
    history = DeploymentRecord(config.state.deployments, config.target).history()
    if (end := taken_back(history, workload, build.build_id, judged_at)) is not None:
        raise RolloutRefused(f"{build.draft_version} was taken back by {end.who} after the gate had judged it (deployment {end.n}: "
                             f"{end.reason}): put it before the gate again with `tide gate {build.build_id} --workload {judged_on}`, or "
                             f"insist with `tide rollout {build.build_id}`")
