"""The local stack without its real parts: record, environment, ports, failures, the launch line."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tide_pipeline import recipes
from tide_pipeline.config import TideConfig, load_toml, override, project_root
from tide_pipeline.errors import PortInUse, StackError
from tide_pipeline.stack import local, record, services
from tide_pipeline.stack.local import LocalStack, down
from tide_pipeline.stack.processes import Service, find, start


@pytest.fixture
def config(tmp_path: Path) -> TideConfig:
    return recipes.load(values={"state_dir": str(tmp_path / "state of mine"), "stack": {"start_timeout_s": 20.0}})


@pytest.fixture
def sleeping_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """`sleep` in MLflow's place, ready at once."""
    def server(place: services.Place) -> Service:
        return Service("mlflow", ["sleep", "60"], place.environment(), place.config.state.logs / "mlflow.log", 1)

    monkeypatch.setattr(services, "mlflow_server", server)
    monkeypatch.setattr(local.probes, "answers", lambda url, expected="": True)


def test_up_freezes_settings_with_the_chosen_ports(config: TideConfig) -> None:
    stack = LocalStack.up(config, parts=())
    frozen = override(TideConfig(), load_toml(Path(stack.record.config_file)))
    ports = [getattr(frozen.stack, name) for name in local.PORTS]
    assert len(set(ports)) == len(ports) and min(ports) > 0
    assert frozen.state_dir == str(config.state.root) and Path(frozen.engines_dir).is_absolute()
    assert stack.urls() == {"triton": stack.triton_url, "mlflow": stack.mlflow_url, "dagster": f"http://127.0.0.1:{frozen.stack.dagster_port}"}
    assert stack.config == frozen


def test_the_environment_works_in_a_shell(config: TideConfig) -> None:
    stack = LocalStack.up(config, parts=())
    script = f". {shlex.quote(str(config.state.root / 'env.sh'))} && env"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    found = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert found["TIDE_CONFIG"] == stack.record.config_file and found["TIDE_MLFLOW_URI"] == stack.mlflow_url
    assert found["TIDE_DAGSTER_DIR"] == str(config.state.dagster) and Path(found["DAGSTER_HOME"], "dagster.yaml").is_file()
    assert "TIDE_STACK_ID" not in found, "a person's shell is no part of the stack"


def test_the_launch_line_survives_the_shell(config: TideConfig) -> None:
    line = LocalStack.up(config, parts=()).launch_line("it's")
    words = shlex.split(line)
    assert words[:4] == ["(", ".", str(config.state.root / "env.sh"), "&&"] and words[-1] == ")"
    assert words[words.index("-j") + 1] == "adapt_draft"
    assert json.loads(words[words.index("--config-json") + 1])["ops"]["draft_checkpoint"]["config"]["workload"] == "it's"
    assert json.loads(words[words.index("--tags") + 1]) == {"tide/target": "pocket", "tide/workload": "it's"}


def test_the_run_queue_limits_the_tag_that_the_launch_line_sets(config: TideConfig) -> None:
    import yaml

    limits = yaml.safe_load((services.dagster_home() / "dagster.yaml").read_text())["concurrency"]["runs"]["tag_concurrency_limits"]
    assert {limit["key"]: limit["limit"] for limit in limits} == {"tide/target": 1, "tide/maintains": 1}


def test_a_fixed_port_in_use_names_the_setting(config: TideConfig) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortInUse, match=rf"port {port} .*stack\.dagster_port"):
            LocalStack.up(override(config, {"stack": {"dagster_port": port}}), parts=())
    assert record.load(config.state) is None


@pytest.mark.usefixtures("sleeping_mlflow")
def test_up_twice_down_once(config: TideConfig) -> None:
    told: list[str] = []
    first = LocalStack.up(config, parts=("mlflow",), say=told.append)
    second = LocalStack.up(config, parts=("mlflow",), say=told.append)
    assert second.record == first.record and "is up already" in told[-1]
    running = LocalStack.running(config.state)
    assert running is not None and running.record == first.record
    assert first.down() == []
    assert LocalStack.running(config.state) is None and find(first.record.processes[0]) is None
    with pytest.raises(StackError, match="no stack is up"):
        down(config.state)


@pytest.mark.usefixtures("sleeping_mlflow")
def test_a_dead_stack_is_told_of_and_replaced(config: TideConfig) -> None:
    first = LocalStack.up(config, parts=("mlflow",))
    process = find(first.record.processes[0])
    assert process is not None
    process.kill()
    process.wait(10)
    with pytest.raises(StackError, match=r"not whole, mlflow ended .*tide up"):
        record.need(config.state)
    told: list[str] = []
    second = LocalStack.up(config, parts=("mlflow",), say=told.append)
    assert "removing what is left" in told[0] and second.record.stack_id != first.record.stack_id
    second.down()


@pytest.mark.usefixtures("sleeping_mlflow")
def test_two_state_directories_side_by_side(config: TideConfig, tmp_path: Path) -> None:
    one, two = (LocalStack.up(override(config, {"state_dir": str(tmp_path / name)}), parts=("mlflow",)) for name in ("one", "two"))
    one.down()
    assert LocalStack.running(two.state) is not None and not set(one.record.urls.values()) & set(two.record.urls.values())
    two.down()


def test_a_part_that_fails_takes_the_others_with_it(config: TideConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def server(place: services.Place) -> Service:
        return Service("mlflow", ["sh", "-c", "echo database is locked >&2; exit 1"], place.environment(),
                       place.config.state.logs / "mlflow.log")

    def starting(service: Service, *, bound: bool) -> local.ProcessRef:
        if "dagster" in service.name:
            command = ["echo", services.STORED] if service.name == "dagster_storage" else ["sleep", "60"]
            service = Service(service.name, command, service.environment, service.log)
        begun.append(start(service, bound=bound))
        return begun[-1]

    monkeypatch.setattr(services, "mlflow_server", server)
    monkeypatch.setattr(local, "start", starting)
    monkeypatch.setattr(local.probes, "listens", lambda host, port: True)
    monkeypatch.setattr(local.probes, "definitions_are_loaded", lambda url: True)
    with pytest.raises(StackError, match=r"mlflow ended while it started(.|\n)*database is locked"):
        LocalStack.up(config, parts=("mlflow", "dagster"))
    assert len(begun) == 5 and not any(find(ref) for ref in begun)
    assert record.load(config.state) is None


def test_only_one_command_at_a_time(config: TideConfig) -> None:
    with local._alone(config.state), pytest.raises(StackError, match="another command is starting or stopping"):
        LocalStack.up(config, parts=())


def test_commands_that_need_a_stack_say_how_to_start_it(config: TideConfig) -> None:
    with pytest.raises(StackError, match="start it with `tide up`"):
        record.need(config.state)
    LocalStack.up(config, parts=())
    record.save(config.state, record.StackRecord("x", "pocket", "", time.time(), {}, (), ready=False))
    with pytest.raises(StackError, match="still starting"):
        record.need(config.state)


def test_a_record_that_is_not_ours_is_not_guessed_at(config: TideConfig) -> None:
    config.state.root.mkdir(parents=True)
    (config.state.root / "stack.json").write_text('{"pids": [1]}')
    with pytest.raises(StackError, match="can't be read"):
        LocalStack.up(config, parts=())


def test_children_know_their_stack(config: TideConfig) -> None:
    stack = LocalStack.up(config, parts=())
    place = services.Place(stack.config, Path(stack.record.config_file), stack.record.stack_id)
    replica = services.replica(place, "replica-0", place.config_file)
    for service in (services.mlflow_server(place), replica, services.dagster_daemon(place), services.dagster_code(place)):
        assert service.environment["TIDE_STACK_ID"] == stack.record.stack_id
        assert service.environment["TIDE_CONFIG"] == stack.record.config_file
        assert service.environment["OMP_WAIT_POLICY"] == "passive" and service.log.parent == config.state.logs
    assert replica.nice == 0 < services.dagster_web(place).nice, "serving comes first"
    assert os.environ.get("TIDE_STACK_ID") is None


def test_further_replicas_have_settings_and_ports_of_their_own(config: TideConfig) -> None:
    place = local._place(override(config, {"serve": {"replicas": 3}}), "any")
    starter = local._Starter(place, lambda line: None, bound=False)
    urls = starter._urls()
    assert len(set(urls)) == 3 and urls[0] == place.urls["triton_replica"]
    assert starter._settings_of("replica-0") == place.config_file
    for name, url in zip(("replica-1", "replica-2"), urls[1:], strict=True):
        found = override(TideConfig(), load_toml(starter._settings_of(name)))
        assert found.serve.replica == name and url.endswith(f":{found.stack.triton_http_port}")
        assert found.stack.front_port == place.config.stack.front_port, "the rest is the stack's"
        service = services.replica(place, name, starter._settings_of(name))
        assert service.name == name.replace("-", "_") and service.command[service.command.index("--replica") + 1] == name


def test_make_clean_stops_every_stack_of_the_checkout(config: TideConfig, sleeping_mlflow: None, tmp_path: Path) -> None:
    """That of `tide up`, and that of `make demo DEMO_ARGS=--keep` beside it; the Makefile is run elsewhere, where it may delete."""
    tide, checkout = Path(sys.executable).with_name("tide"), tmp_path / "checkout"
    (checkout / "venv" / "bin").mkdir(parents=True)
    (checkout / "venv" / "bin" / "tide").symlink_to(tide)
    (checkout / "Makefile").write_text((project_root() / "Makefile").read_text())
    stacks = [LocalStack.up(override(config, {"state_dir": str(checkout / place)}), parts=("mlflow",)) for place in (".tide", ".tide/demo")]
    try:
        done = subprocess.run(["make", "clean", "VENV=venv"], cwd=checkout, capture_output=True, text=True, timeout=240,
                              env={**os.environ, "PYTHONPATH": str(project_root())})
        assert done.returncode == 0, done.stdout + done.stderr
        assert [find(ref) for stack in stacks for ref in stack.record.processes] == [None, None]
        assert sorted(path.name for path in checkout.iterdir()) == ["Makefile"] and tide.exists()
    finally:
        for stack in stacks:
            record.save(stack.state, stack.record)         # where it was deleted
            stack.down()
