"""The local stack: MLflow, Triton replicas behind a front, and Dagster, started together and stopped together.

    stack = LocalStack.up(config, say=print)      the stack of a state directory; one that is up already is taken as it is
    stack = LocalStack.running(config.state)      None when there is none
    stack.down()                                  leaves no process behind

Knows the order and the record; commands are services.py's, processes are processes.py's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from tide_pipeline import recipes
from tide_pipeline.config import StackSettings, StatePaths, TideConfig, override, project_root
from tide_pipeline.errors import StackError
from tide_pipeline.provenance import write_atomic
from tide_pipeline.serve.front.replicas import ReplicaSpec, write_replicas
from tide_pipeline.serve.process import choose_ports
from tide_pipeline.stack import probes, record, services
from tide_pipeline.stack.processes import ProcessRef, Service, find, said, start, stop, wait_until
from tide_pipeline.stack.record import StackRecord
from tide_pipeline.stack.services import DEFINITIONS, Place

Say = Callable[[str], None]
PORTS = ("front_port", "triton_http_port", "triton_grpc_port", "triton_metrics_port", "mlflow_port", "dagster_port", "dagster_code_port")
TRITON_PORTS = ("triton_http_port", "triton_grpc_port", "triton_metrics_port")
PARTS = ("mlflow", "replica", "dagster")


class LocalStack:
    """A running stack."""

    def __init__(self, state: StatePaths, found: StackRecord) -> None:
        self.state, self.record = state, found

    @classmethod
    def up(cls, config: TideConfig, *, say: Say = lambda line: None, bound: bool = False, parts: Sequence[str] = PARTS,
           definitions: str = DEFINITIONS) -> LocalStack:
        """Start everything and wait until it answers. `bound`: it ends with the calling thread, even when that is killed.

        Raises:
            PortInUse: a fixed port is taken; the setting is named.
            StackError: a part did not start, with what its log says last. Nothing is left running then.
        """
        state = config.state
        with _alone(state):
            found = record.load(state)
            if found is not None and found.is_up():
                say(f"the stack in {state.root} is up already")
                return cls(state, found)
            if found is not None:
                say(f"removing what is left of an earlier stack in {state.root}")
                _clean(state, found)
            starter = _Starter(_place(config, definitions), say, bound)
            try:
                starter.run(parts)
            except BaseException:
                _clean(state, starter.record)
                raise
            return cls(state, starter.record)

    @classmethod
    def running(cls, state: StatePaths) -> LocalStack | None:
        """The stack of this state directory when all of it is there."""
        found = record.load(state)
        return cls(state, found) if found is not None and found.is_up() else None

    def down(self) -> list[str]:
        """Stop it. Returns what had to be killed."""
        return down(self.state)

    @property
    def config(self) -> TideConfig:
        """The settings it was started with, ports included."""
        return recipes.load(file=Path(self.record.config_file))

    @property
    def triton_url(self) -> str:
        return self.record.urls["triton"]

    @property
    def dagster_url(self) -> str:
        return self.record.urls["dagster"]

    @property
    def mlflow_url(self) -> str:
        return self.record.urls["mlflow"]

    def urls(self) -> dict[str, str]:
        """What a person would open or call."""
        return {name: self.record.urls[name] for name in ("triton", "mlflow", "dagster")}

    def draft_version(self, build_id: str) -> str:
        """The draft version of a build; the build id itself where it can't be read."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            build = json.loads((self.state.builds / self.record.target / build_id / "build.json").read_text())
            return str(build["draft_version"])
        return build_id

    def launch_line(self, workload: str = "default") -> str:
        """A line for any POSIX shell that launches the job adapt_draft on the running daemon."""
        dagster = Path(sys.executable).with_name("dagster")
        program = [str(dagster)] if dagster.is_file() else [sys.executable, "-m", "dagster"]
        config = {"ops": {"draft_checkpoint": {"config": {"workload": workload, "reason": "launched by hand"}}}}
        tags = {"tide/target": self.record.target, "tide/workload": workload}
        line = [*program, "job", "launch", "-w", str(services.workspace_file()), "-j", "adapt_draft",
                "--config-json", json.dumps(config), "--tags", json.dumps(tags)]
        return f"( . {shlex.quote(str(self.state.root / 'env.sh'))} && {shlex.join(line)} )"


def down(state: StatePaths) -> list[str]:
    """Stop the stack of a state directory, whole or in part. Returns what had to be killed. Raises StackError when there is none."""
    with _alone(state):
        found = record.load(state)
        if found is None:
            raise StackError(f"no stack is up in {state.root}")
        return _clean(state, found)


class _Starter:
    """One start, in the order that keeps two cores busy and nobody waiting on the network."""

    def __init__(self, place: Place, say: Say, bound: bool) -> None:
        self.place, self.say, self.bound = place, say, bound
        self.config, self.state = place.config, place.config.state
        self.timeout_s = self.config.stack.start_timeout_s
        self.replicas: list[ReplicaSpec] = []
        self.record = StackRecord(place.stack_id, self.config.target, str(place.config_file), time.time(), place.urls, ())

    def run(self, parts: Sequence[str]) -> None:
        began = time.monotonic()
        mlflow = self._start(services.mlflow_server(self.place)) if "mlflow" in parts else None
        if "dagster" in parts:
            if said_instead := self._run(services.dagster_storage(self.place), services.STORED):
                raise StackError(f"Dagster's storage could not be created: {said_instead}")
            code, web = self._start(services.dagster_code(self.place)), self._start(services.dagster_web(self.place))
        replicas = self._replicas() if "replica" in parts else {}
        if "dagster" in parts:
            daemon = self._await_dagster(code, web)
        if mlflow is not None:
            wait_until(lambda: probes.answers(f"{self.place.urls['mlflow']}/health", "OK"), mlflow, self.timeout_s)
            self._ready("mlflow", began)
        for name, ref in replicas.items():
            wait_until(partial(probes.supervisor_is_ready, self.place.replica_state_file(name)), ref, self.timeout_s)
        if replicas:
            front = self._front()
            wait_until(lambda: probes.answers(f"{self.place.urls['triton']}/v2/health/ready"), front, self.timeout_s)
            self._ready("triton", began)
            if mlflow is not None:
                self._register_shipped()
        if "dagster" in parts:
            wait_until(lambda: probes.daemon_beats(self.place.urls["dagster"], daemon.started_at), daemon, self.timeout_s)
            self._ready("dagster", began)
        self.record = dataclasses.replace(self.record, ready=True)
        record.save(self.state, self.record)

    def _start(self, service: Service) -> ProcessRef:
        ref = start(service, bound=self.bound)
        self.record = dataclasses.replace(self.record, processes=(*self.record.processes, ref))
        record.save(self.state, self.record)
        return ref

    def _replicas(self) -> dict[str, ProcessRef]:
        """Name -> its supervisor."""
        from tide_pipeline.rollout.initial import ensure_initial  # imports torch

        deployment = ensure_initial(self.config)
        self.say(f"deployment {deployment.n}: {deployment.reason}" if deployment else "serving without a draft: the engine ships none")
        self.replicas = [ReplicaSpec(name, url) for name, url in zip(self.config.serve.replica_names, self._urls(), strict=True)]
        started = {}
        for spec in self.replicas:
            self.place.replica_state_file(spec.name).unlink(missing_ok=True)
            started[spec.name] = self._start(services.replica(self.place, spec.name, self._settings_of(spec.name)))
        return started

    def _urls(self) -> list[str]:
        """Of each replica's HTTP port. The first has the ports of the settings, the others free ones, frozen in files of their own."""
        urls = [self.place.urls["triton_replica"]]
        for name in self.config.serve.replica_names[1:]:
            ports = dict(zip(TRITON_PORTS, choose_ports(StackSettings(host=self.config.stack.host), TRITON_PORTS), strict=True))
            recipes.freeze(override(self.config, {"stack": ports, "serve": {"replica": name}}), self._settings_of(name))
            urls.append(f"http://{self.place.near}:{ports['triton_http_port']}")
        return urls

    def _settings_of(self, name: str) -> Path:
        first = name == self.config.serve.replica_names[0]
        return self.place.config_file if first else self.place.config_file.with_name(f"settings-{name}.toml")

    def _front(self) -> ProcessRef:
        write_replicas(self.place.replicas_file, self.replicas)
        self.place.front_state_file.unlink(missing_ok=True)
        return self._start(services.front(self.place))

    def _await_dagster(self, code: ProcessRef, web: ProcessRef) -> ProcessRef:
        """The daemon comes last: it looks for code once a minute."""
        stack = self.config.stack
        wait_until(lambda: probes.listens(self.place.near, stack.dagster_code_port), code, self.timeout_s)
        wait_until(lambda: probes.definitions_are_loaded(self.place.urls["dagster"]), web, self.timeout_s)
        return self._start(services.dagster_daemon(self.place))

    def _register_shipped(self) -> None:
        """Once per state directory. Serving needs no registry: a failure is told and gone on from."""
        done = self.state.mlflow / f"{self.config.target}.shipped"
        if done.exists():
            return
        if said_instead := self._run(services.registrar(self.place), services.REGISTERED):
            self.say(f"the shipped draft is not registered in MLflow: {said_instead}")
        else:
            done.touch()

    def _run(self, service: Service, success: str) -> str:
        """A child that ends by itself. "" when its log says `success`, else what it says."""
        ref = start(service, bound=self.bound)
        gives_up = time.monotonic() + self.timeout_s
        while find(ref) is not None and time.monotonic() < gives_up:
            time.sleep(0.2)
        stop([ref], "")
        return "" if success in Path(ref.log).read_text(errors="replace") else said(ref)

    def _ready(self, name: str, began: float) -> None:
        self.say(f"{name} is ready after {time.monotonic() - began:.0f} s: {self.place.urls[name]}")


def _place(config: TideConfig, definitions: str) -> Place:
    """Paths absolute, ports chosen, settings frozen, environment written for shells."""
    ports = dict(zip(PORTS, choose_ports(config.stack, PORTS), strict=True))
    chosen = override(config, {"stack": ports, "state_dir": str(config.state.root), "engines_dir": str(Path(config.engines_dir).resolve())})
    file = config.state.root / "settings.toml"
    for folder in (chosen.state.mlflow, chosen.state.dagster / "logs", chosen.state.logs):
        folder.mkdir(parents=True, exist_ok=True)
    recipes.freeze(chosen, file)
    place = Place(chosen, file, secrets.token_hex(8), definitions)
    lines = [f"export {name}={shlex.quote(value)}" for name, value in place.shell_environment().items()]
    write_atomic(config.state.root / "env.sh", ("\n".join(lines) + "\n").encode(), mode=0o600)
    if not services.workspace_file().is_file():
        raise StackError(f"{services.workspace_file()} is missing: run from a checkout, or set TIDE_PROJECT_ROOT to one ({project_root()})")
    return place


def _clean(state: StatePaths, found: StackRecord) -> list[str]:
    killed = stop(reversed(found.processes), found.stack_id)
    record.forget(state)
    return killed


@contextlib.contextmanager
def _alone(state: StatePaths) -> Iterator[None]:
    """One command at a time starts or stops the stack of a state directory."""
    state.root.mkdir(parents=True, exist_ok=True)
    with (state.root / "stack.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StackError(f"another command is starting or stopping the stack in {state.root}: wait for it") from error
        yield
