"""Ports, process groups, Triton's command line and what serving may import."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tide_pipeline.config import StackSettings
from tide_pipeline.errors import PortInUse, StackError
from tide_pipeline.serve.process import choose_ports, die_with_parent, end_group, group_members
from tide_pipeline.serve.triton import Installation, Ports, find_triton, link_backends, triton_command

NAMES = ("triton_http_port", "triton_grpc_port", "triton_metrics_port")


def test_free_ports_differ_and_named_ones_are_kept() -> None:
    ports = choose_ports(StackSettings(), NAMES)
    assert len(set(ports)) == 3 and min(ports) > 0
    assert choose_ports(StackSettings(triton_http_port=ports[0]), NAMES)[0] == ports[0]


def test_a_port_in_use_names_its_setting() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortInUse, match=rf"port {port} .* set stack\.triton_grpc_port to a free port"):
            choose_ports(StackSettings(triton_grpc_port=port), NAMES)


def test_end_group_takes_grandchildren_too() -> None:
    child = subprocess.Popen(["sh", "-c", "sleep 60 & sleep 60 & wait"], start_new_session=True)
    while len(group_members(child.pid)) < 3:
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert group_members(child.pid)
    end_group(child.pid, 0.1)
    assert not group_members(child.pid)


def test_a_child_dies_with_its_parent() -> None:
    script = ("import subprocess, sys, time; from tide_pipeline.serve.process import die_with_parent;"
              "p = subprocess.Popen(['sleep', '60'], preexec_fn=die_with_parent); print(p.pid, flush=True); time.sleep(60)")
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        if not Path(f"/proc/{child}/stat").exists() or Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.02)
    raise AssertionError("the child outlived its parent")


def test_backend_folder_is_links_and_can_be_made_again(tmp_path: Path) -> None:
    for _ in range(2):
        backends = link_backends(find_triton(), tmp_path / "backends")
    parts = sorted((backends / "python").iterdir())
    assert [p.name for p in parts] == ["libtriton_python.so", "triton_python_backend_stub", "triton_python_backend_utils.py"]
    assert all(p.is_symlink() and p.is_file() for p in parts)


def test_a_missing_stub_says_which_python(tmp_path: Path) -> None:
    triton = find_triton()
    with pytest.raises(StackError, match=r"use 3\.11 or 3\.12"):
        link_backends(Installation(triton.server, triton.backend, tmp_path / "nowhere"), tmp_path / "backends")


def test_command_listens_on_loopback_and_closes_management() -> None:
    triton = Installation(Path("/t/server"), Path("/t/backend"), Path("/t/stub"))
    command = triton_command(triton, repository=Path("/r"), backends=Path("/b"), model="tiny", host="127.0.0.1", ports=Ports(1, 2, 3),
                             shm_prefix="x-", admin_secret="s")
    for option in ("--http-address=127.0.0.1", "--grpc-address=127.0.0.1", "--metrics-address=127.0.0.1", "--load-model=tiny",
                   "--model-control-mode=explicit", "--http-restricted-api=shared-memory,model-repository,trace,logging:tide-admin=s"):
        assert option in command


def test_serving_imports_without_the_orchestrators() -> None:
    blocked = ("dagster", "mlflow", "duckdb", "httpx", "typer", "rich", "psutil", "pandas", "transformers", "tritonclient", "pytriton")
    script = (f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
              "from tide_pipeline.serve import agent, client, desk, metrics, repository, supervisor, triton")
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_die_with_parent_can_be_called() -> None:
    assert subprocess.run(["true"], preexec_fn=die_with_parent, check=False).returncode == 0
