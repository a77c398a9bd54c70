"""Findings about GPUs and their driver, from nvidia-smi's answer given as text. A machine without one is no fault: the embedded engine
serves on its CPU. Asks nobody but `ask_nvidia_smi`.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tide_pipeline.config import TideConfig
from tide_pipeline.stack.doctor.finding import Finding

FIELDS = ("index", "name", "driver_version", "memory.total", "memory.used", "compute_cap")
NEEDED_DRIVER = 580                # of CUDA 13, which the NGC containers of docker/serve.Dockerfile carry
BF16_COMPUTE = (8, 0)              # Ampere: what serving needs
OLDEST_COMPUTE = (7, 0)            # Volta: trains a draft in fp32, as [train.v100] of engines/*/recipes.toml
BUSY_SHARE = 0.05                  # of a GPU's memory, used before we start


@dataclass(frozen=True, slots=True)
class Gpu:
    """One line of nvidia-smi. Memory in MiB."""

    index: int
    name: str
    driver: str
    memory_mib: int
    used_mib: int
    compute: tuple[int, int]


def ask_nvidia_smi() -> str | None:
    """Its table; None where there is no driver to ask. Raises OSError with what it says when it can't answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    done = subprocess.run([program, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"], capture_output=True, text=True,
                          timeout=30)
    if done.returncode:
        raise OSError(f"nvidia-smi: {(done.stdout + done.stderr).strip().splitlines()[0] if done.stdout + done.stderr else 'no answer'}")
    return done.stdout


def parse_gpus(text: str) -> list[Gpu]:
    """Raises OSError for a line of another form. Numbers that a GPU won't tell ("[N/A]", partitioned ones) are 0."""
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(FIELDS):
            raise OSError(f"nvidia-smi answered {line!r}, not {', '.join(FIELDS)}")
        major, _, minor = cells[5].partition(".")
        found.append(Gpu(_number(cells[0]), cells[1], cells[2], _number(cells[3]), _number(cells[4]), (_number(major), _number(minor))))
    return found


def check_gpus(gpus: Sequence[Gpu] | None, config: TideConfig, torch_sees: int) -> Iterator[Finding]:
    """`None`: no driver. `torch_sees`: GPUs that this Python's torch can use."""
    wanted = [name for name in (config.serve.device, config.training.device, *config.training.train_devices) if name.startswith("cuda")]
    if not gpus:
        found = "no NVIDIA driver" if gpus is None else "a driver, and no GPU"
        if wanted:
            yield Finding("gpu: driver", "fail", f"{found}, but the settings ask for {', '.join(dict.fromkeys(wanted))}",
                          'set serve.device and training.device to "cpu", or run where the driver is '
                          "(in Docker: the NVIDIA container toolkit)")
        else:
            yield Finding("gpu: driver", "ok", f"{found}: no GPU here, the embedded engine serves and trains on the CPU")
        return
    yield _driver(gpus[0].driver)
    yield from (_card(gpu) for gpu in gpus)
    if torch_sees == 0:
        yield Finding("gpu: torch", "fail" if wanted else "warn", "this Python's torch sees none of them",
                      "install torch built for CUDA (the containers of docker-compose.yml have it), or look at CUDA_VISIBLE_DEVICES")
    else:
        yield from _settings(wanted, torch_sees)


def _driver(version: str) -> Finding:
    if _number(version.partition(".")[0]) >= NEEDED_DRIVER:
        return Finding("gpu: driver", "ok", version)
    return Finding("gpu: driver", "warn", f"{version}, older than {NEEDED_DRIVER}, which CUDA 13 asks for",
                   "update the driver; on data-centre GPUs the container may bring its own compatibility libraries: try it")


def _card(gpu: Gpu) -> Finding:
    name = f"gpu: {gpu.index}"
    told = f"{gpu.name}, {gpu.memory_mib / 1024:.0f} GiB, compute capability {gpu.compute[0]}.{gpu.compute[1]}"
    if gpu.compute < OLDEST_COMPUTE:
        return Finding(name, "fail", f"{told}: too old", "serve on an A100's generation or later, train on a V100's or later")
    if gpu.compute < BF16_COMPUTE:
        return Finding(name, "warn", f"{told}: no bf16: can train in fp32, can't serve",
                       "train on it with training.autocast = false and a torch that was built for it (CUDA 13 has no Volta any more)")
    if gpu.used_mib > BUSY_SHARE * gpu.memory_mib:
        return Finding(name, "warn", f"{told}, {gpu.used_mib / 1024:.1f} GiB in use",
                       "see who uses it: `nvidia-smi`; an engine takes what is free")
    return Finding(name, "ok", told)


def _settings(wanted: Sequence[str], torch_sees: int) -> Iterator[Finding]:
    beyond = [name for name in wanted if int(name.partition(":")[2] or 0) >= torch_sees]
    if beyond:
        yield Finding("gpu: settings", "fail", f"the settings name {', '.join(beyond)}, torch sees {torch_sees} GPUs",
                      f"name cuda:0 to cuda:{torch_sees - 1}, or give this process more GPUs")
    elif len(wanted) > 1 and torch_sees == 1:
        yield Finding("gpu: settings", "warn", "serving and training share the only GPU",
                      "train on another one: training takes memory and time from serving (where each has a container, all is well)")
    elif not wanted:
        yield Finding("gpu: settings", "warn", "the settings use none of them", 'set serve.device and training.device to "cuda:<n>"')
    else:
        yield Finding("gpu: settings", "ok", f"{', '.join(dict.fromkeys(wanted))} of {torch_sees}")


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0
