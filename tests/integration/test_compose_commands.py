"""Every command of docker-compose.yml as a plain process: the gpu profile's services in their order, health checks included.

What a container would have is put in place by rewriting words: names of services and their ports become 127.0.0.1 and free ones, /app,
/state, /etc/tide and /run/secrets become folders, "cuda" becomes "cpu". PostgreSQL is real where its programs are installed, else its
users get SQLite; moto stands in for MinIO. Not run here: the programs of three images (MinIO with its `mc`, Grafana with its `wget`, and
Prometheus unless it is installed). `tide up` of the cpu profile is in test_local_stack.py.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from moto import server as moto

from tests import postgres
from tests.compose import interpolated, is_one_shot, load
from tests.unit.test_dockerfiles import instructions
from tide_pipeline.config import project_root
from tide_pipeline.contracts import GenerationRequest, SamplingParams
from tide_pipeline.serve.client import TritonClient
from tide_pipeline.serve.process import die_with_parent

pytestmark = pytest.mark.e2e           # about a minute on a quiet machine

PORTS = {"triton": (8000, 8001, 8002), "front": (8000,), "mlflow": (5000,), "dagster-code": (4000,), "dagster-web": (3000,),
         "prometheus": (9090,), "postgres": (5432,)}
FOREIGN = {"storage", "grafana", "postgres"}       # their images' programs; postgres is started by tests/postgres.py
INSTEAD = {"/run/secrets": "secrets", "/etc/tide": "etc", "/tmp": "tmp", "/state": "state"}
PLACES = re.compile(rf"(?<![\w/.])({'|'.join([*INSTEAD, '/app'])})(?=[/\"']|$)", re.M)
TIMEOUT_S = 600.0                      # a busy machine, not a slow program


@dataclass
class Place:
    """Where the containers' world lies, and what was started in it."""

    folder: Path
    storage_url: str
    database: postgres.Server | None
    ports: dict[tuple[str, int], int]
    compose: dict[str, Any] = field(default_factory=load)
    started: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def words(self, text: str, owner: str = "") -> str:
        """As the container's, rewritten for here. Bare port numbers are those of `owner`."""
        text = PLACES.sub(lambda match: str(self.folder / INSTEAD[match[0]] if match[0] in INSTEAD else project_root()), interpolated(text))
        text = text.replace("http://storage:9000", self.storage_url)
        if self.database is None:
            text = re.sub(r"postgresql\+psycopg2://\S+", f"sqlite:///{self.folder}/mlflow.db", text)
            text = re.sub(r"postgresql://\S+", "", text)
        for (name, port), here in self.ports.items():
            known = name if "allowed-hosts" in text else "127.0.0.1"
            text = re.sub(rf"\b{name}:{port}\b", f"{known}:{here}", text)
            if name == owner:
                text = re.sub(rf"(?<=[:=]){port}\b|^{port}$|(?<=_port = ){port}\b", str(here), text, flags=re.M)
        return text.replace("0.0.0.0", "127.0.0.1").replace('"cuda"', '"cpu"')

    def environment(self, name: str) -> dict[str, str]:
        """The image's, then the service's; nothing of this shell but PATH."""
        image = [line for line in instructions("Dockerfile") if line.startswith("ENV")][-1]
        values = dict(pair.split("=", 1) for pair in image.split()[1:] if not pair.startswith("PATH"))
        values |= self.compose["services"][name].get("environment", {})
        owner = "dagster-code" if "TIDE_DAGSTER_CODE_PORT" in values else name
        ours = {key: self.words(str(value), owner) for key, value in values.items()}
        ours |= {key: "127.0.0.1" for key in ours if key.endswith("_HOST")}
        return {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]), "HOME": str(self.folder),
                "PYTHONPATH": str(project_root()), "OMP_NUM_THREADS": "1", **ours}

    def command(self, name: str, words: list[str]) -> list[str]:
        here = [self.words(word, name) for word in words]
        return [sys.executable if here[0] in ("python", "python3") else here[0], *here[1:]]

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """As the image's entrypoint would."""
        entry = ["sh", str(project_root() / "docker" / "with-secrets.sh")]
        with (self.folder / f"{name}.log").open("wb") as log:
            self.started[name] = subprocess.Popen([*entry, *self.command(name, self.compose["services"][name]["command"])],
                                                  env=self.environment(name), stdin=subprocess.DEVNULL, stdout=log,
                                                  stderr=subprocess.STDOUT, start_new_session=True, cwd=self.folder,
                                                  preexec_fn=die_with_parent)
        return self.started[name]

    def finish(self, name: str) -> str:
        """A one-shot's output, when it ended well."""
        assert is_one_shot(self.compose["services"][name])
        assert self.start(name).wait(TIMEOUT_S) == 0, self.said(name)
        return self.said(name)

    def is_healthy(self, name: str) -> bool:
        """The health check's own command, in the container's environment, which has no secrets in it."""
        words = self.compose["services"][name]["healthcheck"]["test"]
        return subprocess.run(self.command(name, words[1:]), env=self.environment(name), capture_output=True,
                              timeout=TIMEOUT_S).returncode == 0

    def await_healthy(self, *names: str) -> None:
        gives_up = time.monotonic() + TIMEOUT_S
        for name in names:
            while not self.is_healthy(name):
                assert self.started[name].poll() is None and time.monotonic() < gives_up, self.said(name)
                time.sleep(0.3)

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")[-3_000:]

    def stop(self) -> None:
        for process in reversed(self.started.values()):
            if process.poll() is None:
                process.terminate()
        for process in self.started.values():
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Secrets, settings, storage and, where it can be had, PostgreSQL with the databases that its first start makes."""
    for name in ("etc", "tmp", "state"):
        (tmp_path / name).mkdir()
    subprocess.run(["sh", str(project_root() / "docker" / "make-secrets.sh"), str(tmp_path / "secrets")], check=True, capture_output=True)
    s3 = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    s3.start()
    with contextlib.ExitStack() as stack:
        stack.callback(s3.stop)
        database = None
        if postgres.programs() is not None:
            database = stack.enter_context(postgres.server((tmp_path / "secrets" / "postgres_password").read_text()))
        keys = [(name, port) for name, ports in PORTS.items() for port in ports]
        ports = dict(zip(keys, free_ports(len(keys)), strict=True))
        if database is not None:
            ports["postgres", 5432] = database.port
        here = Place(tmp_path, "http://{}:{}".format(*s3.get_host_and_port()), database, ports)
        for name, config in here.compose["configs"].items():
            owner = "triton" if name == "settings" else ""
            target = next(c["target"] for s in here.compose["services"].values() for c in s.get("configs", []) if c["source"] == name)
            Path(here.words(target)).write_text(here.words((project_root() / config["file"]).read_text(), owner))
        stack.callback(here.stop)
        yield here


def make_databases(place: Place) -> None:
    """docker/postgres/databases.sh, as the image runs it: as superuser, over the socket, which asks for no password."""
    assert place.database is not None
    script = place.folder / "databases.sh"
    text = (project_root() / "docker" / "postgres" / "databases.sh").read_text()
    script.write_text(text.replace("/run/secrets", str(place.folder / "secrets")))
    environment = {"PATH": os.environ["PATH"], "POSTGRES_USER": "postgres", "PGHOST": str(place.database.folder),
                   "PGPORT": str(place.database.port)}
    subprocess.run(["sh", str(script)], env=environment, check=True, timeout=120)
    for user, other in (("dagster", "mlflow"), ("mlflow", "dagster")):
        secret = (place.folder / "secrets" / f"{user}_db_password").read_text()
        assert place.database.psql("select current_user", user=user, database=user, password=secret) == user
        with pytest.raises(subprocess.CalledProcessError):
            place.database.psql("select 1", user=user, database=other, password=secret)
        with pytest.raises(subprocess.CalledProcessError):
            place.database.psql("select 1", user=user, database=user, password="another")


def test_the_gpu_profile_without_docker(place: Place) -> None:
    if place.database is not None:
        assert place.is_healthy("postgres")
        make_databases(place)
    told = place.finish("init-serving")
    assert "bucket tide: made" in told and "bucket tide-mlflow: made" in told and "deployment 1: shipped with the engine" in told
    assert "bucket tide: there" in place.finish("init-serving"), "it may run again"
    for name in ("mlflow", "triton", "front"):
        assert not place.is_healthy(name), "nobody is there yet"
        place.start(name)
    place.await_healthy("mlflow")
    kind = "PostgresRunStorage" if place.database else "SqliteRunStorage"
    told = place.finish("init-pipeline")
    assert f"Dagster's storage: {kind}" in told and "registered draft: shipped-" in told
    place.start("dagster-code")
    assert "--workload" in place.finish("trainer")
    place.await_healthy("dagster-code")
    place.start("dagster-web")
    assert not place.is_healthy("dagster-daemon")
    place.start("dagster-daemon")
    place.await_healthy("triton", "front", "dagster-web", "dagster-daemon")
    expected = {name for name, s in place.compose["services"].items() if name != "tide"} - FOREIGN - {"prometheus"}
    assert place.started.keys() == expected, "every command is run here or named above"
    check_serving(place)
    check_mlflow(place)
    check_dagster(place)
    if shutil.which("prometheus") and shutil.which("wget"):
        check_prometheus(place)
    place.stop()
    assert [name for name, process in place.started.items() if process.returncode == -signal.SIGKILL] == [], "each ends when it is told"
    assert not any(place.is_healthy(name) for name in ("mlflow", "triton", "front", "dagster-code", "dagster-web"))


def check_serving(place: Place) -> None:
    client = TritonClient(f"http://127.0.0.1:{place.ports['front', 8000]}", "pocket")
    result = client.generate(GenerationRequest("r1", "The sea", SamplingParams(max_tokens=8)))
    assert result.text and client.ready()


def check_mlflow(place: Place) -> None:
    """The shipped draft is there, its bytes are in the bucket, and strangers' Host headers are refused."""
    port = place.ports["mlflow", 5000]
    url = f"http://127.0.0.1:{port}/api/2.0/mlflow/registered-models/search"
    assert "pocket-draft" in httpx.get(url, headers={"Host": f"mlflow:{port}"}).text
    assert httpx.get(url, headers={"Host": "evil.example"}).status_code == 403
    listed = httpx.get(f"{place.storage_url}/tide-mlflow?list-type=2").text
    assert "model.safetensors" in listed


def check_dagster(place: Place) -> None:
    url = f"http://127.0.0.1:{place.ports['dagster-web', 3000]}/graphql"
    query = "{ repositoriesOrError { ... on RepositoryConnection { nodes { location { name } jobs { name } } } } }"
    nodes = httpx.post(url, json={"query": query}, timeout=60).json()["data"]["repositoriesOrError"]["nodes"]
    assert [node["location"]["name"] for node in nodes] == ["tide_pipeline"] and "adapt_draft" in {job["name"] for job in nodes[0]["jobs"]}
    if place.database is not None:
        secret = (place.folder / "secrets" / "dagster_db_password").read_text()
        beats = place.database.psql("select count(*) from daemon_heartbeats", user="dagster", database="dagster", password=secret)
        assert int(beats) >= 2 and not list((place.folder / "state").rglob("runs.db")), "PostgreSQL alone keeps Dagster's state"


def check_prometheus(place: Place) -> None:
    """The same arguments and files, on the Prometheus that is installed here; the replica's alias becomes its address."""
    config = place.folder / "etc" / "prometheus"
    config.mkdir()
    for name in ("prometheus.yml", "alerts.yml"):
        text = (project_root() / "docker" / name).read_text()
        (config / name).write_text(text.replace("replica:8002", f"127.0.0.1:{place.ports['triton', 8002]}"))
    words = [place.words(word, "prometheus").replace("/etc/prometheus", str(config)).replace("=/prometheus", f"={place.folder / 'tsdb'}")
             for word in place.compose["services"]["prometheus"]["command"]]
    with (place.folder / "prometheus.log").open("wb") as log:
        place.started["prometheus"] = subprocess.Popen(["prometheus", *words], stdout=log, stderr=subprocess.STDOUT, cwd=place.folder,
                                                         preexec_fn=die_with_parent)
    place.await_healthy("prometheus")
    url, gives_up = f"http://127.0.0.1:{place.ports['prometheus', 9090]}/api/v1", time.monotonic() + 120
    while not (found := httpx.get(f"{url}/query", params={"query": "tide_deployment"}).json()["data"]["result"]):
        assert time.monotonic() < gives_up, place.said("prometheus")
        time.sleep(0.5)
    assert found[0]["value"][1] == "1" and found[0]["metric"]["target"] == "pocket"
    groups = httpx.get(f"{url}/rules").json()["data"]["groups"]
    assert len(groups[0]["rules"]) > 8 and all(not rule.get("lastError") for rule in groups[0]["rules"])
