"""Start, await and stop one tritonserver: the nvidia-pytriton wheel's, or an installed one. Knows its options, not the model."""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import tide_pipeline
from tide_pipeline.config import TideConfig
from tide_pipeline.errors import StackError
from tide_pipeline.serve.client import TritonClient
from tide_pipeline.serve.orphan import SHM_PREFIX, remove_stale_shared_memory
from tide_pipeline.serve.process import children_of, choose_ports, die_with_parent, end_group, is_child
from tide_pipeline.serve.repository import render_model_repository

log = logging.getLogger(__name__)

EXIT_TIMEOUT_S = 10                # requests in flight get this long at a stop
STUB_GRACE_S = 8.0                 # the Python stub flushes the lake when its server was killed
PORT_SETTINGS = ("triton_http_port", "triton_grpc_port", "triton_metrics_port")
CLOSED_APIS = "shared-memory,model-repository,trace,logging"


@dataclass(frozen=True, slots=True)
class Ports:
    http: int
    grpc: int
    metrics: int


@dataclass(frozen=True, slots=True)
class Installation:
    """A tritonserver and its Python backend."""

    server: Path
    backend: Path                  # folder with libtriton_python.so and triton_python_backend_utils.py
    stub: Path


def find_triton() -> Installation:
    """The wheel's, with the stub of this Python; else an installed one (NVIDIA's container). Raises StackError."""
    spec = importlib.util.find_spec("pytriton")
    if spec is not None and spec.submodule_search_locations:
        root = Path(spec.submodule_search_locations[0]) / "tritonserver"
        stub = root / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}" / "triton_python_backend_stub"
        return Installation(root / "bin" / "tritonserver", root / "backends" / "python", stub)
    installed = shutil.which("tritonserver") or "/opt/tritonserver/bin/tritonserver"
    if Path(installed).is_file():
        backend = Path(installed).resolve().parent.parent / "backends" / "python"
        return Installation(Path(installed), backend, backend / "triton_python_backend_stub")
    raise StackError("no tritonserver: `pip install nvidia-pytriton` (x86-64), or run inside NVIDIA's Triton container")


def link_backends(triton: Installation, into: Path) -> Path:
    """A backend directory of symlinks (a copied stub would not find its libraries). Raises StackError for a missing part."""
    folder = into / "python"
    folder.mkdir(parents=True, exist_ok=True)
    for part in (triton.backend / "libtriton_python.so", triton.backend / "triton_python_backend_utils.py", triton.stub):
        if not part.is_file():
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            raise StackError(f"{part} is missing: this tritonserver has no Python backend for Python {version}, use 3.11 or 3.12")
        fresh = folder / f".{part.name}.{os.getpid()}"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(part)
        fresh.replace(folder / part.name)
    return into


def triton_command(triton: Installation, *, repository: Path, backends: Path, model: str, host: str, ports: Ports, shm_prefix: str,
                   admin_secret: str) -> list[str]:
    """The command line. Repository, shared-memory, trace and logging endpoints answer only to who knows `admin_secret`."""
    return [
        str(triton.server), f"--model-repository={repository}", f"--backend-directory={backends}",
        "--model-control-mode=explicit", f"--load-model={model}", "--disable-auto-complete-config", "--strict-readiness=true",
        f"--http-address={host}", f"--http-port={ports.http}", f"--grpc-address={host}", f"--grpc-port={ports.grpc}",
        f"--metrics-address={host}", f"--metrics-port={ports.metrics}", "--metrics-interval-ms=1000",
        "--allow-gpu-metrics=false", "--allow-cpu-metrics=false", "--pinned-memory-pool-byte-size=0",
        f"--exit-timeout-secs={EXIT_TIMEOUT_S}", f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
        f"--http-restricted-api={CLOSED_APIS}:tide-admin={admin_secret}",
        f"--grpc-restricted-protocol={CLOSED_APIS}:tide-admin={admin_secret}",
    ]


def triton_environment(config_file: Path, threads: int) -> dict[str, str]:
    """Triton's stub runs the `python3` that PATH finds first, on the libpython that the loader finds first: both must be ours."""
    package = str(Path(tide_pipeline.__file__).resolve().parent.parent)
    places = [package, sysconfig.get_path("purelib"), *filter(None, [os.environ.get("PYTHONPATH")])]
    libraries = [str(sysconfig.get_config_var("LIBDIR") or ""), os.environ.get("LD_LIBRARY_PATH", "")]
    return {**os.environ, "TIDE_CONFIG": str(config_file.resolve()), "PYTHONPATH": os.pathsep.join(places),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
            "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}


class TritonReplica:
    """One tritonserver with its model repository, backend links and log. `with TritonReplica(...) as replica:` starts and stops it."""

    def __init__(self, config: TideConfig, config_file: Path, *, replica: str = "") -> None:
        self.config, self.config_file, self.replica = config, config_file, replica or config.serve.replica
        self.log = config.state.logs / f"triton-{self.replica}.log"
        self.ports: Ports | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._shm_prefix = ""
        self._engines: list[int] = []          # process ids of its stubs, since it was ready

    def __enter__(self) -> TritonReplica:
        try:
            self.start()
            self.wait_ready(self.config.stack.start_timeout_s)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def client(self) -> TritonClient:
        assert self.ports is not None, "not started"
        host = self.config.stack.host
        return TritonClient(f"http://{host}:{self.ports.http}", self.config.target, metrics_url=f"http://{host}:{self.ports.metrics}/metrics")

    def start(self) -> None:
        """Render, choose ports, start. Raises PortInUse, StackError. Call it from a thread that outlives the server."""
        state, triton = self.config.state, find_triton()
        repository = render_model_repository(self.config, state.model_repository / self.replica, replica=self.replica,
                                             config_file=self.config_file.resolve())
        backends = link_backends(triton, state.root / "triton" / "backends")
        self.ports = Ports(*choose_ports(self.config.stack, PORT_SETTINGS))
        remove_stale_shared_memory()
        self._shm_prefix = f"{SHM_PREFIX}{os.getpid()}-{secrets.token_hex(4)}-"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = triton_command(triton, repository=repository, backends=backends, model=self.config.target, host=self.config.stack.host,
                                 ports=self.ports, shm_prefix=self._shm_prefix, admin_secret=secrets.token_hex(16))
        self._engines = []
        with self.log.open("ab") as stream:
            self._process = subprocess.Popen(
                command, env=triton_environment(self.config_file, self.config.serve.threads), stdin=subprocess.DEVNULL, stdout=stream,
                stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=die_with_parent)

    def returncode(self) -> int | None:
        """None while it runs; also reaps it.

        A server whose engine died is killed here: Triton 2.51 goes on without one, ready as before, and answers every request with 400.
        """
        if self._process is None:
            return 0
        if self._process.poll() is None and not all(is_child(pid, self.pid) for pid in self._engines):
            log.error("the engine of %s died, its tritonserver is ended", self.replica)
            self._process.kill()
            self._process.wait()
        return self._process.poll()

    def is_ready(self) -> bool:
        is_ready = self.returncode() is None and self.client.ready()
        if is_ready and not self._engines:
            self._engines = children_of(self.pid)
        return is_ready

    def wait_ready(self, timeout_s: float) -> None:
        """Raises StackError with the log's last words when the server ends or takes too long."""
        gives_up = time.monotonic() + timeout_s
        while not self.is_ready():
            if self.returncode() is not None:
                raise StackError(f"tritonserver ended with code {self.returncode()}: {self._last_words()} (all of it in {self.log})")
            if time.monotonic() > gives_up:
                raise StackError(f"tritonserver was not ready after {timeout_s:.0f} s: see {self.log}, or raise stack.start_timeout_s")
            time.sleep(0.1)

    def stop(self) -> None:
        """SIGTERM, patience for what is in flight, then SIGKILL; returns when server and stub are gone. Can be called again."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(EXIT_TIMEOUT_S + 5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self.clean_up()

    def clean_up(self) -> None:
        """After the server ended, however it did: wait for its stub, remove its shared memory."""
        assert self._process is not None
        end_group(self._process.pid, STUB_GRACE_S)
        for region in Path("/dev/shm").glob(f"{self._shm_prefix}*"):  # noqa: S108 the place is Triton's choice
            region.unlink(missing_ok=True)

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-200:]
        began = max((i for i, line in enumerate(lines) if line.startswith("error:")), default=len(lines) - 3)
        return " ".join(line.strip() for line in lines[max(0, began):] if line.strip())[:600]
