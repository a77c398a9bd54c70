"""docker-compose.yml and what it reads, as far as it can be checked without an engine: the specification's schema, our own rules."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.compose import Compose, altered, interpolated, lint, load, profiles, texts
from tide_pipeline import recipes
from tide_pipeline.cli import app
from tide_pipeline.cli.app import hoist, parse_value
from tide_pipeline.config import TideConfig, merge, parse, project_root
from tide_pipeline.serve.front.replicas import read_replicas
from tide_pipeline.stack.local import PORTS

PUBLISHED = ("front_port", "triton_metrics_port", "mlflow_port", "dagster_port")      # not the replica behind the front
WANTED = {"cpu": {"tide"},
          "gpu": {"postgres", "storage", "mlflow", "dagster-code", "dagster-web", "dagster-daemon", "triton", "front", "prometheus",
                  "grafana", "init-serving", "init-pipeline"},
          "metrics": {"prometheus", "grafana"}, "by-hand": {"trainer"}}


@pytest.fixture(scope="module")
def compose() -> Compose:
    return load()


def check_schema(file: Path) -> subprocess.CompletedProcess[str]:
    """The Compose specification's own schema, as the package check-jsonschema carries it. Reaches for no network."""
    command = [str(Path(sys.executable).with_name("check-jsonschema")), "--builtin-schema", "vendor.compose-spec", str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_it_follows_the_compose_specification(compose: Compose, tmp_path: Path) -> None:
    done = check_schema(project_root() / "docker-compose.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = altered(compose, "services.triton.depends_on.init-serving.condition", "service_is_fine")
    (tmp_path / "docker-compose.yml").write_text(yaml.safe_dump(altered(wrong, "services.front.healtcheck", {})))
    refused = check_schema(tmp_path / "docker-compose.yml")
    assert refused.returncode == 1 and "healtcheck" in refused.stdout and "service_is_fine" in refused.stdout


def test_it_keeps_our_rules(compose: Compose) -> None:
    assert lint(compose) == []


def test_each_profile_is_what_it_says(compose: Compose) -> None:
    found = {profile: {name for name, s in compose["services"].items() if profile in s["profiles"]} for profile in profiles(compose)}
    assert found == WANTED


@pytest.mark.parametrize(("path", "value", "said"), [
    ("services.postgres.image", "postgres:latest", "not pinned"),
    ("services.postgres.image", "postgres", "not pinned"),
    ("services.front.build", None, "has no build"),
    ("services.front.ports", ["8000:8000"], "not published on 127.0.0.1"),
    ("services.front.ports", ["0.0.0.0:8000:8000"], "not published on 127.0.0.1"),
    ("services.front.networks", ["inside"], "not on the network `edge`"),
    ("services.postgres.networks", ["inside", "edge"], "publishes nothing"),
    ("services.triton.privileged", True, "opens the host"),
    ("services.triton.security_opt", [], "may gain privileges"),
    ("services.dagster-code.volumes", ["/var/run/docker.sock:/var/run/docker.sock"], "root on the host"),
    ("services.mlflow.healthcheck", None, "no whole health check"),
    ("services.mlflow.restart", None, "no restart policy"),
    ("services.triton.deploy.resources.limits", {}, "no memory limit"),
    ("services.mlflow.profiles", [], "has no profile"),
    ("services.mlflow.secrets", ["storage_key"], "is not given it"),
    ("services.mlflow.environment.PGPASSWORD", "hunter2", "holds a secret"),
    ("services.mlflow.environment.URL", "postgresql://a:b@postgres/x", "password in its address"),
    ("secrets.postgres_password", None, "is not declared"),
    ("services.mlflow.depends_on", ["postgres", "storage"], "no condition"),
    ("services.mlflow.depends_on.postgres.condition", "service_started", "not service_healthy"),
    ("services.triton.depends_on.init-serving.condition", "service_healthy", "not service_completed_successfully"),
    ("services.postgres.profiles", ["cpu"], "is in the profile gpu, and postgres is not"),
    ("services.triton.environment.X", "${TIDE_X}", "has no default"),
    ("volumes.attic", {}, "volume attic is used by nobody"),
])
def test_each_rule_can_break(compose: Compose, path: str, value: Any, said: str) -> None:
    assert any(said in text for text in lint(altered(compose, path, value))), lint(altered(compose, path, value))


def test_serving_waits_for_nothing_of_the_pipeline(compose: Compose) -> None:
    """Losing PostgreSQL, MLflow, Dagster or the trainer may not keep a replica or the front from starting."""
    todo, seen = ["triton", "front"], set()
    while todo:
        seen.add(name := todo.pop())
        todo += compose["services"][name].get("depends_on", {})
    assert seen == {"triton", "front", "init-serving", "storage"}


def test_the_two_gpus_are_not_the_same_by_default(compose: Compose) -> None:
    ids = {name: interpolated(service["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"][0])
           for name, service in compose["services"].items() if "reservations" in service.get("deploy", {}).get("resources", {})}
    assert ids == {"triton": "0", "dagster-code": "1", "trainer": "1"}


def test_the_example_of_the_environment_names_what_may_be_set_and_no_values(compose: Compose) -> None:
    lines = (project_root() / ".env.example").read_text().splitlines()
    assert all(re.fullmatch(r"(#.*|[A-Z_]+=)", line) for line in lines)
    used = {name for text in texts(compose) for name in re.findall(r"\$\{(\w+)", text)}
    assert {line[:-1] for line in lines if line.endswith("=")} == used


# --- what it reads -----------------------------------------------------------------------------------------------

def test_mounted_files_are_there(compose: Compose) -> None:
    mounted = {text.split(":")[0] for s in compose["services"].values() for text in s.get("volumes", []) if text.startswith("./")}
    for name in {*mounted, *(config["file"] for config in compose["configs"].values())}:
        assert (project_root() / name).exists(), name


def test_the_gpu_settings_are_ours(compose: Compose) -> None:
    config = recipes.load(file=project_root() / "docker" / "settings.gpu.toml")
    assert config.serve.device == config.training.device == "cuda" and config.lake == "s3://tide/lake" and config.state_dir == "/state"
    assert (project_root() / "engines" / config.engine / "engine.toml").is_file()
    replica, = read_replicas(project_root() / "docker" / "replicas.json")
    assert replica.name == config.serve.replica and replica.address == ("triton", config.stack.triton_http_port)
    buckets = re.findall(r"--bucket (\S+)", " ".join(compose["services"]["init-serving"]["command"]))
    artifacts, = (word for word in compose["services"]["mlflow"]["command"] if word.startswith("--artifacts-destination"))
    assert buckets == [config.lake.split("/")[2], artifacts.split("/")[2]]


def test_the_quickstart_makes_settings_for_a_large_target_of_its_recipe() -> None:
    """The command of the page: the recipe's values, with the devices, ports and places of the containers."""
    line, = re.findall(r"^ *\.venv/bin/tide (config .+) > \S+$", (project_root() / "docs" / "gpu-quickstart.md").read_text(), re.M)
    words = [str(project_root() / word) if word.startswith("docker/") else word for word in line.split()]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    config, ours = parse(TideConfig, tomllib.loads(done.stdout)), recipes.load(file=project_root() / "docker" / "settings.gpu.toml")
    recipe = recipes.load(words[words.index("--recipe") + 1])
    assert (config.engine, config.training.draft_vocab_size) == (recipe.engine, 0) and config.rollout == recipe.rollout
    assert config.training == replace(recipe.training, device="cuda") and config.serve == recipe.serve and config.stack == ours.stack
    assert (config.engines_dir, config.state_dir, config.lake) == (ours.engines_dir, ours.state_dir, ours.lake)
    assert ours.stack.start_timeout_s < config.rollout.serve_timeout_s


def test_the_secrets_script_writes_what_compose_asks_for(compose: Compose, tmp_path: Path) -> None:
    script, folder = project_root() / "docker" / "make-secrets.sh", tmp_path / "secrets"
    told = subprocess.check_output(["sh", str(script), str(folder)], text=True)
    files = {path.name: path.read_text() for path in folder.iterdir()}
    assert files.keys() == compose["secrets"].keys() == {Path(s["file"]).name for s in compose["secrets"].values()}
    assert len(set(files.values())) == len(files) and all(re.fullmatch("[0-9a-f]{48}", secret) for secret in files.values())
    assert not any(secret in told for secret in files.values())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and all(os.access(path, os.R_OK) for path in folder.iterdir())
    assert "written" not in subprocess.check_output(["sh", str(script), str(folder)], text=True)
    assert files == {path.name: path.read_text() for path in folder.iterdir()}, "a second run changes nothing"
    assert all("docker/secrets" in (project_root() / name).read_text() for name in (".gitignore", ".dockerignore"))


def test_secrets_come_from_files(tmp_path: Path) -> None:
    entry, secret = str(project_root() / "docker" / "with-secrets.sh"), tmp_path / "secret"
    secret.write_text("s p a c e $HOME\n")
    environment = {"PATH": os.environ["PATH"], "PGPASSWORD_FILE": str(secret)}
    command = ["sh", entry, sys.executable, "-c", "import os, sys; print(os.environ['PGPASSWORD'], sys.argv[1])", "a b"]
    assert subprocess.check_output(command, text=True, env=environment) == "s p a c e $HOME a b\n"
    secret.write_text("")
    done = subprocess.run(command, text=True, env=environment, capture_output=True)
    assert done.returncode == 2 and "make-secrets" in done.stderr and not done.stdout


# --- the cpu profile ---------------------------------------------------------------------------------------------

def settings_of(command: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for word in hoist(command):
        if word.startswith("--set="):
            values = merge(values, parse_value(word.removeprefix("--set=")))
    return values


def test_the_cpu_profile_runs_tide_up(compose: Compose) -> None:
    service = compose["services"]["tide"]
    assert service["command"][:5] == ["tide", "--state", "/state", "up", "--foreground"] and "secrets" not in service
    config = recipes.load(values=settings_of(service["command"]))
    assert config.stack.host == "0.0.0.0"
    assert all(getattr(config.stack, name) for name in PUBLISHED), "published ports must be fixed"
    fixed = {getattr(config.stack, name) for name in PORTS} - {0}
    assert {f"127.0.0.1:{port}:{port}" for port in fixed} == set(service["ports"])


def test_docker_context_is_valid_json_where_it_is_json() -> None:
    for path in (project_root() / "docker").rglob("*.json"):
        json.loads(path.read_text())
