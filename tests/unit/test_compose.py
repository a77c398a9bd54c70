"""docker-compose.yml, as far as it can be checked without an engine: what it runs are our options, what it opens is loopback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tide_pipeline import recipes
from tide_pipeline.cli.app import hoist, parse_value
from tide_pipeline.config import merge, project_root
from tide_pipeline.stack.local import PORTS

PUBLISHED = ("front_port", "triton_metrics_port", "mlflow_port", "dagster_port")      # not the replica behind the front


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((project_root() / "docker-compose.yml").read_text())["services"]["tide"]
    return found


def settings_of(command: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for word in hoist(command):
        if word.startswith("--set="):
            values = merge(values, parse_value(word.removeprefix("--set=")))
    return values


def test_the_command_is_ours(service: dict[str, Any]) -> None:
    assert service["profiles"] == ["cpu"] and service["command"][:2] == ["up", "--foreground"]
    config = recipes.load(values=settings_of(service["command"]))
    assert config.stack.host == "0.0.0.0"
    assert all(getattr(config.stack, name) for name in PUBLISHED), "published ports must be fixed"


def test_every_open_port_is_published_on_loopback_alone(service: dict[str, Any]) -> None:
    config = recipes.load(values=settings_of(service["command"]))
    fixed = {getattr(config.stack, name) for name in PORTS} - {0}
    assert {f"127.0.0.1:{port}:{port}" for port in fixed} == set(service["ports"])


def test_the_image_holds_what_it_copies() -> None:
    copied = [word for line in Path(project_root() / "Dockerfile").read_text().splitlines() if line.startswith("COPY")
              for word in line.split()[1:-1]]
    assert {"tide_pipeline", "engines", "dagster_home", "requirements.lock"} <= set(copied)
    ignored = (project_root() / ".dockerignore").read_text().split()
    assert not set(copied) & set(ignored)
