"""A step that needs MLflow waits while it is away, and does not wait for what it refuses. Fast; starts no stack."""

from __future__ import annotations

import socket
from pathlib import Path

import dagster as dg
import pytest

from tide_pipeline.defs.draft import AWAY_S, AWAY_TRIES, waiting_while_away
from tide_pipeline.errors import RegistryError
from tide_pipeline.registry.registry import Registry

pytestmark = [pytest.mark.filterwarnings("ignore::Warning:mlflow.*"), pytest.mark.filterwarnings("ignore::ResourceWarning")]


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        registry = Registry(f"http://127.0.0.1:{closed.getsockname()[1]}", "tiny")
        with pytest.raises(dg.RetryRequested) as asked, waiting_while_away():
            registry.find("d" * 64)
    assert asked.value.max_retries == AWAY_TRIES and AWAY_TRIES * AWAY_S >= 600


def test_a_version_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RegistryError), waiting_while_away():
        Registry(f"sqlite:///{tmp_path / 'mlflow.db'}", "tiny").get(7)
