"""What Dagster is doing, asked over its GraphQL endpoint as any other client would. Imports no Dagster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx

from tide_pipeline.errors import StackError

_QUERY = """
query Runs($job: String!) {
  runsOrError(filter: {pipelineName: $job}, limit: 5) {
    __typename
    ... on Runs { results { runId status creationTime startTime endTime tags { key value }
      stepStats { stepKey status startTime endTime } } }
    ... on PythonError { message }
  }
}
"""


@dataclass(frozen=True)
class Step:
    """Times in Unix seconds; 0 while it has not come to that."""

    key: str
    status: str                    # IN_PROGRESS, SUCCESS, FAILURE, SKIPPED
    started: float
    ended: float


@dataclass(frozen=True)
class RunView:
    """One Dagster run."""

    run_id: str
    status: str                    # QUEUED, STARTING, STARTED, SUCCESS, FAILURE, CANCELED ...
    created: float
    started: float
    ended: float
    tags: dict[str, str]
    steps: dict[str, Step]

    @property
    def over(self) -> bool:
        return self.status in ("SUCCESS", "FAILURE", "CANCELED")


def runs_of(dagster_url: str, job: str, timeout_s: float = 10.0) -> list[RunView]:
    """The last runs of a job, newest first. Raises StackError when the webserver does not answer."""
    try:
        answer = httpx.post(f"{dagster_url}/graphql", json={"query": _QUERY, "variables": {"job": job}}, timeout=timeout_s)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()["data"]["runsOrError"]
    except (httpx.HTTPError, KeyError, TypeError, ValueError) as error:
        raise StackError(f"Dagster's webserver at {dagster_url} did not answer ({error}): is the stack up? see `tide status`") from error
    if found["__typename"] != "Runs":
        raise StackError(f"Dagster refused to list the runs of {job}: {found.get('message', found['__typename'])}")
    return [_view(raw) for raw in found["results"]]


def _view(raw: dict[str, Any]) -> RunView:
    steps = {s["stepKey"]: Step(s["stepKey"], s["status"] or "", s["startTime"] or 0.0, s["endTime"] or 0.0) for s in raw["stepStats"]}
    return RunView(raw["runId"], raw["status"], raw["creationTime"] or 0.0, raw["startTime"] or 0.0, raw["endTime"] or 0.0,
                   {t["key"]: t["value"] for t in raw["tags"]}, steps)
