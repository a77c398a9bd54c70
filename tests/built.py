"""A Triton server on a build's own model repository, as NVIDIA's launch script starts it: nothing else says where the settings are."""

from __future__ import annotations

import os
import secrets
import subprocess
from pathlib import Path

from tests.serving import Place
from tide_pipeline.contracts import EngineBuild
from tide_pipeline.serve.orphan import SHM_PREFIX
from tide_pipeline.serve.process import choose_ports, die_with_parent
from tide_pipeline.serve.triton import PORT_SETTINGS, Ports, TritonReplica, find_triton, link_backends, triton_command, triton_environment


class BuiltReplica(TritonReplica):
    """Renders nothing itself, and has no TIDE_CONFIG."""

    def __init__(self, place: Place, build: EngineBuild) -> None:
        super().__init__(place.config, place.config_file)
        self.repository = Path(build.path) / "model_repository"

    def start(self) -> None:
        triton = find_triton()
        backends = link_backends(triton, self.config.state.root / "triton" / "backends")
        self.ports = Ports(*choose_ports(self.config.stack, PORT_SETTINGS))
        self._shm_prefix = f"{SHM_PREFIX}{os.getpid()}-{secrets.token_hex(4)}-"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = triton_command(triton, repository=self.repository, backends=backends, model=self.config.target,
                                 host=self.config.stack.host, ports=self.ports, shm_prefix=self._shm_prefix,
                                 admin_secret=secrets.token_hex(16))
        environment = triton_environment(self.config_file, self.config.serve.threads)
        del environment["TIDE_CONFIG"]
        with self.log.open("ab") as stream:
            self._process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
                                             start_new_session=True, preexec_fn=die_with_parent)
