"""What `tide doctor` makes of a machine: GPUs from nvidia-smi's text, cores, memory, limits, clock, disk, bucket, ports."""

from __future__ import annotations

import json
import resource
import socket
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto import server
from typer.testing import CliRunner

from tide_pipeline.cli import app
from tide_pipeline.config import TideConfig, override
from tide_pipeline.stack.doctor import checks, gpu, lake, machine, ports
from tide_pipeline.stack.doctor.finding import Finding

# As nvidia-smi --query-gpu=index,name,driver_version,memory.total,memory.used,compute_cap --format=csv,noheader,nounits writes it.
H200, A10 = "{i}, NVIDIA H200, {driver}, 143771, {used}, 9.0\n", "{i}, NVIDIA A10, {driver}, 23028, {used}, 8.6\n"
CPU, CUDA = TideConfig(), override(TideConfig(), {"serve": {"device": "cuda:0"}, "training": {"device": "cuda:1"}})
GOOD = machine.Machine(cores=8, shm_mib=2048, open_files=65536, locked_memory=resource.RLIM_INFINITY, clock=0, container="26.07",
                       triton="/opt/tritonserver/bin/tritonserver", wait_policy="PASSIVE")


def by_name(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def two(driver: str = "580.95.05", used: int = 4) -> str:
    return H200.format(i=0, driver=driver, used=used) + A10.format(i=1, driver=driver, used=0)


# --- GPUs --------------------------------------------------------------------------------------------------------

def test_nvidia_smi_is_read() -> None:
    first, second = gpu.parse_gpus(two())
    assert first == gpu.Gpu(0, "NVIDIA H200", "580.95.05", 143771, 4, (9, 0)) and second.compute == (8, 6)
    assert gpu.parse_gpus("0, NVIDIA H200 MIG, 580.1, [N/A], [N/A], 9.0\n")[0].memory_mib == 0
    with pytest.raises(OSError, match="not index, name"):
        gpu.parse_gpus("Failed to initialize NVML: Driver/library version mismatch\n")


def test_no_gpu_is_a_fact_and_no_fault() -> None:
    for none in (None, []):
        only, = gpu.check_gpus(none, CPU, 0)
        assert only.state == "ok" and "the embedded engine serves and trains on the CPU" in only.found
        asked, = gpu.check_gpus(none, CUDA, 0)
        assert asked.state == "fail" and "cuda:0, cuda:1" in asked.found and "serve.device" in asked.todo


def test_two_gpus_as_they_should_be() -> None:
    assert {f.state for f in gpu.check_gpus(gpu.parse_gpus(two()), CUDA, 2)} == {"ok"}


@pytest.mark.parametrize(("text", "config", "torch_sees", "name", "state", "said"), [
    (two(driver="570.12"), CUDA, 2, "gpu: driver", "warn", "older than 580"),
    (two(used=90_000), CUDA, 2, "gpu: 0", "warn", "87.9 GiB in use"),
    ("0, Tesla V100-SXM2-32GB, 580.1, 32768, 0, 7.0\n", CPU, 1, "gpu: 0", "warn", "no bf16: can train in fp32, can't serve"),
    ("0, Tesla T4, 580.1, 15360, 0, 7.5\n", CPU, 1, "gpu: 0", "warn", "no bf16: can train in fp32, can't serve"),
    ("0, Tesla P100-PCIE-16GB, 580.1, 16384, 0, 6.0\n", CPU, 1, "gpu: 0", "fail", "too old"),
    (two(), CUDA, 0, "gpu: torch", "fail", "sees none"),
    (two(), CPU, 0, "gpu: torch", "warn", "sees none"),
    (two(), CUDA, 1, "gpu: settings", "fail", "cuda:1"),
    (two(), CPU, 2, "gpu: settings", "warn", "use none"),
    (H200.format(i=0, driver="580.1", used=0), override(CUDA, {"training": {"device": "cuda:0"}}), 1, "gpu: settings", "warn", "share"),
])
def test_what_is_wrong_with_gpus_is_said(text: str, config: TideConfig, torch_sees: int, name: str, state: str, said: str) -> None:
    finding = by_name(gpu.check_gpus(gpu.parse_gpus(text), config, torch_sees))[name]
    assert finding.state == state and said in finding.found and finding.todo


def test_nvidia_smi_is_asked_as_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\n[ "$1" = "--query-gpu={",".join(gpu.FIELDS)}" ] && [ "$2" = --format=csv,noheader,nounits ] || exit 2\n'
                       "echo '0, NVIDIA L40S, 580.1, 46068, 0, 8.9'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.parse_gpus(gpu.ask_nvidia_smi() or "")[0].name == "NVIDIA L40S"
    program.write_text("#!/bin/sh\necho 'Driver/library version mismatch'; exit 18\n")
    with pytest.raises(OSError, match="version mismatch"):
        gpu.ask_nvidia_smi()
    program.unlink()
    assert gpu.ask_nvidia_smi() is None


# --- the machine -------------------------------------------------------------------------------------------------

def test_a_good_machine_has_nothing_to_do() -> None:
    assert {f.state for f in machine.check_machine(GOOD, CUDA)} == {"ok"}


@pytest.mark.parametrize(("change", "config", "name", "state", "said"), [
    ({"triton": ""}, CPU, "triton: server", "fail", "no tritonserver"),
    ({"container": ""}, CPU, "triton: server", "ok", "not in NVIDIA's container"),
    ({"cores": 1.5}, CPU, "cpu: threads", "warn", "1.5 cores; 1 threads serve and 1 train"),
    ({"cores": 1}, CUDA, "cpu: threads", "warn", "1 cores; 0 threads serve"),
    ({"wait_policy": ""}, CPU, "cpu: waiting threads", "warn", "unset"),
    ({"shm_mib": 64}, CPU, "memory: /dev/shm", "fail", "64 MiB, Triton's Python backend needs 128"),
    ({"shm_mib": 512}, CUDA, "memory: /dev/shm", "fail", "needs 1024"),
    ({"open_files": 1024}, CPU, "memory: limits", "warn", "1024 open files"),
    ({"locked_memory": 8 * 2**20}, CUDA, "memory: limits", "warn", "8 MiB may be locked"),
    ({"locked_memory": 8 * 2**20}, CPU, "memory: limits", "ok", "open files"),
    ({"clock": 5}, CPU, "clock", "warn", "not synchronised"),
    ({"clock": -1}, CPU, "clock", "warn", "can't be asked"),
])
def test_what_is_wrong_with_a_machine_is_said(change: dict[str, Any], config: TideConfig, name: str, state: str, said: str) -> None:
    finding = by_name(machine.check_machine(replace(GOOD, **change), config))[name]
    assert finding.state == state and said in finding.found


def test_this_machine_is_read(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    here = machine.look({"OMP_WAIT_POLICY": "passive", "NVIDIA_TRITON_SERVER_VERSION": "26.07"}, tmp_path / "cpu.max")
    assert here.cores == 0.5 and here.container == "26.07" and here.wait_policy == "passive" and here.triton.endswith("tritonserver")
    assert here.shm_mib > 0 and here.open_files > 0 and here.clock in range(-1, 6)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.look({}, tmp_path / "cpu.max").cores >= 1


# --- room and speed ----------------------------------------------------------------------------------------------

def test_room_and_speed_are_judged_by_the_plan() -> None:
    assert lake.judge_room("/x", 1e9, 0).state == "fail"
    assert lake.judge_room("/x", 50e9, 4e9).state == "warn" and "96 GB" in lake.judge_room("/x", 50e9, 4e9).found
    assert lake.judge_room("/x", 100e9, 4e9).state == lake.judge_room("/x", 3e9, 0).state == "ok"
    assert lake.judge_speed("d", 4e6, 4e9, "at /x").state == "warn" and lake.judge_speed("d", 5e6, 4e9, "at /x").state == "ok"
    assert lake.judge_speed("d", 1, 0, "at /x").state == "ok"


def test_a_disk_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    config = override(TideConfig(), {"state_dir": str(tmp_path / "not" / "yet")})
    found = by_name(lake.check_lake(config, trial_bytes=100_000))
    assert str(tmp_path) in found["disk: room"].found and "MB/s at" in found["disk: speed"].found
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    moto = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    endpoint = "http://{}:{}".format(*moto.get_host_and_port())
    for name, value in (("AWS_ENDPOINT_URL_S3", endpoint), ("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test")):
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    client.create_bucket(Bucket="lake")
    yield client
    moto.stop()


def test_a_bucket_is_tried_and_left_as_it_was(tmp_path: Path, bucket: Any) -> None:
    config = override(TideConfig(), {"state_dir": str(tmp_path), "lake": "s3://lake/here", "capture": {"max_bytes_per_hour": 1}})
    found = by_name(lake.check_lake(config, trial_bytes=100_000))
    assert found["network: to the lake"].state == found["network: from the lake"].state == "ok"
    left = [thing["Key"] for thing in bucket.list_objects_v2(Bucket="lake").get("Contents", [])]
    assert left == ["here/"], "nothing but the empty mark of a folder that pyarrow leaves where it deleted"
    bucket.delete_object(Bucket="lake", Key="here/")
    bucket.delete_bucket(Bucket="lake")
    with pytest.raises(OSError, match="lake"):
        list(lake.check_lake(config, trial_bytes=100_000))


# --- ports -------------------------------------------------------------------------------------------------------

def test_ports_are_tried_one_by_one(tmp_path: Path) -> None:
    state = {"state_dir": str(tmp_path)}
    assert by_name(ports.check_ports(override(TideConfig(), state)))["ports"].state == "ok"
    with socket.socket() as taken, socket.socket() as free:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        free.bind(("127.0.0.1", 0))
        busy, idle = taken.getsockname()[1], free.getsockname()[1]
        free.close()
        config = override(TideConfig(), {**state, "stack": {"front_port": busy, "mlflow_port": idle, "dagster_port": idle}})
        found = by_name(ports.check_ports(config))
    assert found["ports: front_port"].state == "fail" and str(busy) in found["ports: front_port"].found
    assert found["ports: mlflow_port"].state == "fail" and "twice" in found["ports: mlflow_port"].found
    opened = by_name(ports.check_ports(override(TideConfig(), {**state, "stack": {"host": "0.0.0.0"}})))
    assert opened["ports: host"].state == "warn" and "password" in opened["ports: host"].found


# --- the command -------------------------------------------------------------------------------------------------

def test_the_command_looks_at_everything(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["doctor", "--json", "--state", str(tmp_path)])
    found = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert {"gpu: driver", "triton: server", "cpu: threads", "memory: /dev/shm", "clock", "disk: room", "disk: speed"} <= found.keys()
    assert all(f["todo"] for f in found.values() if f["state"] != "ok")
    assert done.exit_code == int(any(f["state"] == "fail" for f in found.values()))


def test_a_check_that_can_not_be_made_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: TideConfig) -> Iterator[Finding]:
        raise OSError("no such bucket")
        yield

    monkeypatch.setattr(lake, "check_lake", refuse)
    found = by_name(checks.examine(checks.Asked(config=override(TideConfig(), {"state_dir": str(tmp_path)}))))
    assert found["lake"].state == "fail" and found["lake"].found == "no such bucket" and "ports" in found
