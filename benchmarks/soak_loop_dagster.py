"""What the soak asks of a running Dagster: launch a job, the drift sensor's last words, an adaptation's folder. Imports no Dagster."""

from __future__ import annotations

import contextlib
from typing import Any

import httpx
from soak_loop_judge import Adaptation as Seen

from tide_pipeline.config import TideConfig
from tide_pipeline.defs.adaptation import Adaptation
from tide_pipeline.defs.split import COLLECTED
from tide_pipeline.errors import GateNotPassed, StackError, TideError
from tide_pipeline.gate.run import load_verdict
from tide_pipeline.stack.runs import RunView
from tide_pipeline.stack.services import LOCATION

HOME = {"repositoryLocationName": LOCATION, "repositoryName": "__repository__"}
TAGS = [{"key": "tide/reason", "value": "maintenance of the soak"}]
ROOT = "dagster/root_run_id"       # a run that goes on where another was cut off works in that one's folder
_LAUNCH = "mutation Launch($asked: ExecutionParams!) { launchRun(executionParams: $asked) { __typename ... on PythonError { message } } }"
_SENSOR = """
query Said($sensor: SensorSelector!) {
  sensorOrError(sensorSelector: $sensor) { ... on Sensor { sensorState { ticks(limit: 1) { skipReason } } } } }
"""


def launch(dagster_url: str, job: str) -> None:
    """Raises StackError when it was not launched."""
    answer = _ask(dagster_url, _LAUNCH, {"asked": {"selector": {**HOME, "jobName": job}, "runConfigData": {},
                                                "executionMetadata": {"tags": TAGS}}})["launchRun"]
    if answer["__typename"] != "LaunchRunSuccess":
        raise StackError(f"Dagster did not launch {job}: {answer.get('message', answer['__typename'])[:200]}")


def sensor_said(dagster_url: str) -> str:
    """The drift sensor's last reason not to launch; "" when it launched, or has not looked. Raises StackError."""
    found = _ask(dagster_url, _SENSOR, {"sensor": {**HOME, "sensorName": "drift_sensor"}})["sensorOrError"]
    ticks = (found.get("sensorState") or {}).get("ticks") or [{}]
    return str(ticks[0].get("skipReason") or "")


def seen(config: TideConfig, run: RunView) -> Seen:
    """A run with what it left in its folder and what the gate said."""
    folder, focus_since, verdict = Adaptation.of(config, run.run_id, run.tags.get(ROOT)), 0.0, None
    with contextlib.suppress(TideError):
        focus_since = folder.request().focus_since
    with contextlib.suppress(TideError, GateNotPassed, TypeError):
        verdict = load_verdict(config, folder.build().build_id)
    return Seen(run, focus_since, verdict, folder.marks().get(COLLECTED, 0.0))


def _ask(dagster_url: str, query: str, variables: dict[str, Any]) -> dict[str, Any]:
    try:
        answer = httpx.post(f"{dagster_url}/graphql", json={"query": query, "variables": variables}, timeout=10.0).json()
    except (httpx.HTTPError, ValueError) as error:
        raise StackError(f"Dagster's webserver did not answer: {type(error).__name__}") from error
    if not answer.get("data"):
        raise StackError(f"Dagster refused a query: {str(answer.get('errors'))[:200]}")
    data: dict[str, Any] = answer["data"]
    return data
