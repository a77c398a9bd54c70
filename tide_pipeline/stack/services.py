"""What the local stack runs: command line, environment, niceness and readiness of each part. Starts nothing.

    mlflow           tracking server and registry on SQLite; artifacts are plain files beside it
    replica          the supervisor of one Triton, with the engine in it; `serve.replicas` of them, replica_1 and so on
    front            what clients talk to: checks requests, passes them on to the replicas
    dagster_code     the code server that webserver, daemon and `dagster job launch` share; runs are its children
    dagster_web      the webserver
    dagster_daemon   sensors, run queue, run monitoring

One code server instead of one in each process, measured on two shared cores with small definitions: 3 processes, 403 MB and
5.3 CPU seconds to start instead of 4, 525 MB and 7.5 s; a job launched by hand is queued after 4.5 s instead of 8.9 s, because
nothing has to load the definitions again. MLflow's job runner, which we don't use, would be 8 more processes, 650 MB and 6 s.

Each has a keeper as its parent (serve/keep.py, 11 MB): one that dies comes back on its port. The record names the keepers.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from tide_pipeline.config import TideConfig, project_root
from tide_pipeline.stack.processes import STACK_ID, Service

DEFINITIONS = "tide_pipeline.definitions"
LOCATION = "tide_pipeline"
REGISTERED = "the shipped draft is registered"
STORED = "the storage is there"
ELSEWHERE = ("TIDE_DAGSTER_POSTGRES_URL", "PGPASSWORD")      # whoever launches a run must find the storage of the running stack
POLITE = 10                        # niceness of everything that is not serving
QUIET_MLFLOW = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


@dataclass(frozen=True)
class Place:
    """One stack: settings whose ports are all chosen, the file they are frozen in, and the stack's mark."""

    config: TideConfig
    config_file: Path
    stack_id: str
    definitions: str = DEFINITIONS

    @property
    def near(self) -> str:
        """The host as one on this machine calls it: nobody's name is 0.0.0.0, and MLflow refuses requests for it."""
        host = self.config.stack.host
        return "127.0.0.1" if host == "0.0.0.0" else host  # noqa: S104 compared, not bound

    @property
    def urls(self) -> dict[str, str]:
        s, near = self.config.stack, self.near
        return {"triton": f"http://{near}:{s.front_port}", "triton_replica": f"http://{near}:{s.triton_http_port}",
                "triton_grpc": f"{near}:{s.triton_grpc_port}", "triton_metrics": f"http://{near}:{s.triton_metrics_port}/metrics",
                "mlflow": f"http://{near}:{s.mlflow_port}", "dagster": f"http://{near}:{s.dagster_port}",
                "dagster_code": f"{near}:{s.dagster_code_port}"}

    def replica_state_file(self, name: str) -> Path:
        return self.config.state.root / f"{name}.json"

    @property
    def front_state_file(self) -> Path:
        return self.config.state.root / "front.json"

    @property
    def replicas_file(self) -> Path:
        """What the front sends requests to."""
        return self.config.state.root / "replicas.json"

    def shell_environment(self) -> dict[str, str]:
        """What a command needs to talk to this stack: written to <state>/env.sh."""
        s, state = self.config.stack, self.config.state
        elsewhere = {name: os.environ[name] for name in ELSEWHERE if os.environ.get(name)}
        return {**elsewhere, "TIDE_CONFIG": str(self.config_file), "TIDE_PROJECT_ROOT": str(project_root()),
                "TIDE_MLFLOW_URI": self.urls["mlflow"], "MLFLOW_TRACKING_URI": self.urls["mlflow"],
                "DAGSTER_HOME": str(dagster_home()), "TIDE_DAGSTER_DIR": str(state.dagster),
                "TIDE_DAGSTER_LOGS": str(state.dagster / "logs"), "TIDE_DAGSTER_CODE_HOST": self.near,
                "TIDE_DAGSTER_CODE_PORT": str(s.dagster_code_port)}

    def environment(self) -> dict[str, str]:
        """The whole environment of a child."""
        return {**os.environ, **self.shell_environment(), **QUIET_MLFLOW, STACK_ID: self.stack_id, "OMP_WAIT_POLICY": "passive",
                "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def dagster_home() -> Path:
    return project_root() / "dagster_home"


def workspace_file() -> Path:
    return dagster_home() / "workspace.yaml"


def mlflow_server(place: Place) -> Service:
    """Clients write artifacts straight to the folder, so drafts can be read with or without the server."""
    state, s = place.config.state, place.config.stack
    return _kept(place, "mlflow", "--first", "--whole",
                 "mlflow", "server", "--host", s.host, "--port", str(s.mlflow_port), "--workers", "1",
                 "--backend-store-uri", f"sqlite:///{state.mlflow / 'mlflow.db'}",
                 "--default-artifact-root", (state.mlflow / "artifacts").as_uri(), "--no-serve-artifacts")


def replica(place: Place, name: str, config_file: Path) -> Service:
    """`config_file` is the stack's; of a second replica the same with ports of its own."""
    first = name == place.config.serve.replica_names[0]
    return _kept(place, "replica" if first else name.replace("-", "_"), "tide_pipeline.serve.supervisor", "--config", str(config_file),
                 "--state-file", str(place.replica_state_file(name)), "--replica", name,
                 "--replicas-file", str(place.replicas_file), nice=0)


def front(place: Place) -> Service:
    s = place.config.stack
    return _kept(place, "front", "tide_pipeline.serve.front", "--replicas", str(place.replicas_file),
                 "--state-file", str(place.front_state_file), "--host", s.host, "--port", str(s.front_port), nice=0)


def registrar(place: Place) -> Service:
    """Ends by itself: the shipped draft becomes version 1, where every lineage begins."""
    code = ("from tide_pipeline import recipes; from tide_pipeline.registry.shipped import register_shipped; "
            f"register_shipped(recipes.from_environment()); print({REGISTERED!r})")
    return Service("registrar", [sys.executable, "-c", code], place.environment(), place.config.state.logs / "registrar.log", POLITE)


def dagster_storage(place: Place) -> Service:
    """Ends by itself: Dagster's tables, whole, before two processes would create them at once and break them."""
    code = f"from tide_pipeline.stack.prepare import make_dagster_storage; make_dagster_storage(); print({STORED!r})"
    return Service("dagster_storage", [sys.executable, "-c", code], place.environment(), place.config.state.logs / "dagster_storage.log",
                   POLITE)


def dagster_code(place: Place) -> Service:
    s = place.config.stack
    service = _kept(place, "dagster_code", "--first", "dagster", "api", "grpc", "--module-name", place.definitions, "--host", place.near,
                    "--port", str(s.dagster_code_port), "--location-name", LOCATION)
    return replace(service, tell_children=True)            # a run is cancelled, its trainer leaves a checkpoint


def dagster_web(place: Place) -> Service:
    s = place.config.stack
    return _kept(place, "dagster_web", "--first", "dagster_webserver", "--host", s.host, "--port", str(s.dagster_port),
                 "--workspace", str(workspace_file()))


def dagster_daemon(place: Place) -> Service:
    return _kept(place, "dagster_daemon", "--first", "dagster._daemon", "run", "--workspace", str(workspace_file()))


def _kept(place: Place, name: str, *arguments: str, nice: int = POLITE) -> Service:
    """Options of the keeper, the module and its arguments."""
    command = [sys.executable, "-m", "tide_pipeline.serve.keep", *arguments]
    return Service(name, command, place.environment(), place.config.state.logs / f"{name}.log", nice)
