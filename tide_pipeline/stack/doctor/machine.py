"""Findings about the machine or container: cores and threads, shared memory, limits, clock, Triton. Judges numbers; `look` reads them."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tide_pipeline.config import TideConfig
from tide_pipeline.stack.doctor.finding import Finding

MIB = 2**20
SHM_CPU_MIB, SHM_GPU_MIB = 128, 1024       # Triton's regions; several GPUs' workers talk through it too
OPEN_FILES = 4096
TIME_ERROR = 5                             # adjtimex: not synchronised
CONTAINER = ("NVIDIA_TRITON_SERVER_VERSION", "TRITON_SERVER_VERSION")


@dataclass(frozen=True, slots=True)
class Machine:
    """What was read."""

    cores: float                   # that this process may use, a container's quota included
    shm_mib: float                 # size of /dev/shm
    open_files: int                # soft limit
    locked_memory: int             # bytes, soft limit; -1 is none
    clock: int                     # adjtimex's answer; -1 when it can't be asked
    container: str                 # version of NVIDIA's Triton container; "" outside
    triton: str                    # path of tritonserver; "" for none
    wait_policy: str               # OMP_WAIT_POLICY


def look(environment: Mapping[str, str] = os.environ, cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> Machine:
    return Machine(cores=_cores(cpu_max), shm_mib=_shm_mib(), open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
                   locked_memory=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], clock=_clock(),
                   container=next((environment[name] for name in CONTAINER if environment.get(name)), ""), triton=_triton(),
                   wait_policy=environment.get("OMP_WAIT_POLICY", ""))


def check_machine(machine: Machine, config: TideConfig) -> Iterator[Finding]:
    on_gpu = config.serve.device.startswith("cuda")
    yield _triton_finding(machine)
    yield from _threads(machine, config)
    yield _shared_memory(machine.shm_mib, SHM_GPU_MIB if on_gpu else SHM_CPU_MIB)
    yield _limits(machine, on_gpu)
    yield _clock_finding(machine.clock)


def _triton_finding(machine: Machine) -> Finding:
    if not machine.triton:
        return Finding("triton: server", "fail", "no tritonserver",
                       "pip install nvidia-pytriton (x86-64), or run in NVIDIA's Triton container")
    where = f"NVIDIA's container {machine.container}" if machine.container else "the nvidia-pytriton wheel's, not in NVIDIA's container"
    return Finding("triton: server", "ok", f"{where}: {machine.triton}")


def _threads(machine: Machine, config: TideConfig) -> Iterator[Finding]:
    serve = config.serve.threads if config.serve.device == "cpu" else 0
    train = config.training.threads * max(1, len(config.training.train_devices)) if config.training.device == "cpu" else 0
    told = f"{machine.cores:g} cores; {serve} threads serve and {train} train on the CPU"
    if serve + train > machine.cores:
        yield Finding("cpu: threads", "warn", told,
                      "lower serve.threads and training.threads: two pools on the same cores slow each other many times")
    elif machine.cores < 2:
        yield Finding("cpu: threads", "warn", told, "give it two cores: training, Triton and Dagster wait for the one that serves")
    else:
        yield Finding("cpu: threads", "ok", told)
    if machine.wait_policy.lower() == "passive":
        yield Finding("cpu: waiting threads", "ok", "OMP_WAIT_POLICY=passive")
    else:
        yield Finding("cpu: waiting threads", "warn", f"OMP_WAIT_POLICY={machine.wait_policy or 'unset'} in this shell",
                      "export OMP_WAIT_POLICY=passive for what you start by hand: idle threads spin otherwise (`tide up` sets it itself)")


def _shared_memory(shm_mib: float, needed_mib: int) -> Finding:
    if shm_mib >= needed_mib:
        return Finding("memory: /dev/shm", "ok", f"{shm_mib:.0f} MiB")
    return Finding("memory: /dev/shm", "fail", f"{shm_mib:.0f} MiB, Triton's Python backend needs {needed_mib}",
                   "docker run --shm-size=2g, or shm_size in docker-compose.yml")


def _limits(machine: Machine, on_gpu: bool) -> Finding:
    if machine.open_files < OPEN_FILES:
        return Finding("memory: limits", "warn", f"{machine.open_files} open files at most",
                       f"ulimit -n {OPEN_FILES}: each client and shard is one")
    if on_gpu and machine.locked_memory != resource.RLIM_INFINITY:
        return Finding("memory: limits", "warn", f"{machine.locked_memory // MIB} MiB may be locked",
                       "docker run --ulimit memlock=-1: capture copies into pinned memory")
    return Finding("memory: limits", "ok", f"{machine.open_files} open files")


def _clock_finding(state: int) -> Finding:
    if state < 0:
        return Finding("clock", "warn", "the kernel can't be asked whether it is synchronised",
                       "see that NTP runs (chrony, systemd-timesyncd)")
    if state == TIME_ERROR:
        return Finding("clock", "warn", "not synchronised", "start NTP (chrony, systemd-timesyncd) on the host: drift is judged by the "
                       "times that replicas write, and object storage refuses requests that are minutes off")
    return Finding("clock", "ok", "synchronised")


def _cores(cpu_max: Path) -> float:
    allowed = float(len(os.sched_getaffinity(0)))
    try:
        quota, period = cpu_max.read_text().split()
    except (OSError, ValueError):
        return allowed
    return allowed if quota == "max" else min(allowed, int(quota) / int(period))


def _shm_mib() -> float:
    try:
        return shutil.disk_usage("/dev/shm").total / MIB  # noqa: S108 the place is Triton's choice
    except OSError:
        return 0.0


def _clock() -> int:
    """adjtimex with nothing to change: any user may ask."""
    try:
        return int(ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512)))     # struct timex, all zero
    except (OSError, AttributeError):
        return -1


def _triton() -> str:
    from tide_pipeline.errors import StackError
    from tide_pipeline.serve.triton import find_triton

    try:
        return str(find_triton().server)
    except StackError:
        return ""
