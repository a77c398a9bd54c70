"""Whether a verdict still stands, when a rollout or a proposal is about to begin. Knows the gate's report and the record.

    workload    the verdict is about a workload that the rollout gives the draft to
    champion    the draft that it was held against is the one that serves this workload now
    since then  the draft was not taken back
"""

from __future__ import annotations

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import ANY_WORKLOAD, Deployment, EngineBuild
from tide_pipeline.deployment.builds import read_build
from tide_pipeline.deployment.record import DeploymentRecord
from tide_pipeline.errors import GateNotPassed, RolloutRefused
from tide_pipeline.gate.run import GateReport, load_report, report_file
from tide_pipeline.rollout.history import Drafts, build_serving, rest_of, taken_back


def check_standing(config: TideConfig, latest: Deployment | None, build: EngineBuild, workload: str, *, by_person: bool = False) -> None:
    """`by_person`: somebody named this very build, and may have it again although it was taken back.

    Raises:
        GateNotPassed: there is no report, it is about another workload, or the champion of then is not the one of now.
        RolloutRefused: live traffic or a person took the draft back after the gate had judged it.
        BuildError: the build that serves the workload can't be read.
    """
    report, rest = load_report(config, build.build_id), rest_of(latest)
    _check_workload(report, rest, workload)
    _check_champion(config, report, rest, workload)
    if not by_person:
        _check_since(config, report, workload)


def _check_workload(report: GateReport, rest: Drafts, workload: str) -> None:
    judged, build_id = report.workload, report.build_id
    if workload not in (judged, ANY_WORKLOAD):
        raise GateNotPassed(f"the verdict on build {build_id} is about workload {judged!r}, not {workload!r}: run "
                            f"`tide gate {build_id} --workload {workload}` first")
    if workload == ANY_WORKLOAD and judged in rest:
        raise GateNotPassed(f"the verdict on build {build_id} says nothing of workload '*', as {judged!r} has a draft of its own: replace "
                            f"that one with `tide rollout {build_id} --workload {judged}`, or run `tide gate {build_id} --workload` with "
                            "another workload first")


def _check_champion(config: TideConfig, report: GateReport, rest: Drafts, workload: str) -> None:
    served = build_serving(rest, workload)
    champion = read_build(config.state.builds, config.target, served).draft_version if served else ""
    if report.verdict.champion != champion:
        raise GateNotPassed(f"{report.verdict.challenger} passed against {report.verdict.champion or 'no draft'}, and "
                            f"{champion or 'no draft'} serves {report.workload!r} now: hold it against that one with `tide gate "
                            f"{report.build_id} --workload {report.workload}` (in Dagster: run benchmark_report again); what was served "
                            "before comes back with `tide rollback`")


def _check_since(config: TideConfig, report: GateReport, workload: str) -> None:
    """A run that is run again comes with the verdict that it had: what live traffic or a person said after that counts more."""
    judged_at = report_file(config, report.build_id).stat().st_mtime
    history = DeploymentRecord(config.state.deployments, config.target).history()
    if (end := taken_back(history, workload, report.build_id, judged_at)) is not None:
        raise RolloutRefused(f"{report.verdict.challenger} was taken back by {end.who} after the gate had judged it (deployment {end.n}: "
                             f"{end.reason}): put it before the gate again with `tide gate {report.build_id} --workload "
                             f"{report.workload}`, or insist with `tide rollout {report.build_id}`")
