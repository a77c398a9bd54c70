"""Is it ready? Asked the way its users would. Knows addresses, not processes."""

from __future__ import annotations

import contextlib
import json
import socket
from pathlib import Path
from typing import Any

import httpx

from tide_pipeline.errors import StackError

TIMEOUT_S = 5.0
_LOADED = """
{ workspaceOrError { __typename ... on Workspace { locationEntries { loadStatus locationOrLoadError {
      __typename ... on PythonError { message } ... on RepositoryLocation { repositories { name } } } } } } }
"""
_HEALTH = "{ instance { daemonHealth { allDaemonStatuses { daemonType healthy required lastHeartbeatTime } } } }"


def answers(url: str, expected: str = "") -> bool:
    """Whether GET says 200 (and `expected`)."""
    try:
        response = httpx.get(url, timeout=TIMEOUT_S)
    except httpx.HTTPError:
        return False
    return response.status_code == 200 and expected in response.text


def listens(host: str, port: int) -> bool:
    """Whether somebody accepts connections there."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=TIMEOUT_S):
        return True
    return False


def supervisor_is_ready(state_file: Path) -> bool:
    """Whether the replica's supervisor says so. Raises StackError with the reason when it gave up."""
    try:
        state: dict[str, Any] = json.loads(state_file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    if state["state"] == "failed":
        raise StackError(f"the replica could not start: {state['error']} (log: {state['log']})")
    return bool(state["state"] == "ready")


def definitions_are_loaded(dagster_url: str) -> bool:
    """Whether the webserver has our definitions. Raises StackError with the error when they can't be loaded."""
    entries = _ask(dagster_url, _LOADED).get("workspaceOrError", {}).get("locationEntries", [])
    found = [entry["locationOrLoadError"] or {} for entry in entries if entry["loadStatus"] == "LOADED"]
    broken = [f["message"] for f in found if f.get("__typename") == "PythonError"]
    if broken and "DagsterUserCodeUnreachableError" not in broken[0]:
        raise StackError(f"Dagster can't load the definitions: {broken[0].strip()[-800:]}")
    return any(f.get("repositories") for f in found)


def daemon_beats(dagster_url: str, since: float) -> bool:
    """Whether sensors and the run queue have given a sign of life after `since` (Unix seconds)."""
    statuses = _ask(dagster_url, _HEALTH).get("instance", {}).get("daemonHealth", {}).get("allDaemonStatuses", [])
    beats = {s["daemonType"]: s["lastHeartbeatTime"] or 0.0 for s in statuses if s["healthy"]}
    return all(beats.get(kind, 0.0) >= since for kind in ("SENSOR", "QUEUED_RUN_COORDINATOR"))


def _ask(dagster_url: str, query: str) -> dict[str, Any]:
    """The data of a GraphQL answer; {} while nobody answers."""
    try:
        answer = httpx.post(f"{dagster_url}/graphql", json={"query": query}, timeout=TIMEOUT_S)
        data: dict[str, Any] = answer.json().get("data") or {}
    except (httpx.HTTPError, ValueError):
        return {}
    return data
