"""Install what a container lacks, and nothing else. Run while the serving image is built; standard library only.

    python3 missing.py FILE        lines of FILE: NAME>=OLDEST==INSTALLED

A package that is there and new enough stays. One that is not is installed at the version named, without its dependencies. Ends with an
error when torch is another one afterwards: NVIDIA's build belongs to its TensorRT-LLM. A numpy that is too old is an error, never replaced.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

LINE = re.compile(r"([A-Za-z0-9_.-]+)>=([0-9.]+)==([0-9.]+)")
NEVER = ("torch", "numpy", "tensorrt-llm", "tensorrt", "transformers", "triton")     # what else is in the container needs just these


def version_of(name: str) -> str | None:
    """None when it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def number(version: str) -> tuple[int, ...]:
    """"2.10.0a0+nv" as (2, 10, 0)."""
    parts = re.match(r"[0-9]+(\.[0-9]+)*", version)
    return tuple(int(part) for part in parts[0].split(".")) if parts else ()


def wanted(text: str) -> list[tuple[str, str, str]]:
    """(name, oldest, installed) of each line. Raises ValueError for a line of another form."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    found = [LINE.fullmatch(line) for line in lines]
    if not all(found):
        raise ValueError(f"expected NAME>=OLDEST==INSTALLED, got {lines[found.index(None)]!r}")
    return [(match[1], match[2], match[3]) for match in found if match]


def missing(text: str, version_of: Callable[[str], str | None] = version_of) -> list[str]:
    """What to install, as NAME==VERSION. Raises ValueError when that would replace what NVIDIA built."""
    if refused := [name for name, _, _ in wanted(text) if name in NEVER and name != "numpy"]:
        raise ValueError(f"{refused[0]} is the container's own and may not be named here")
    out = []
    for name, oldest, installed in wanted(text):
        have = version_of(name)
        if have is None:
            out.append(f"{name}=={installed}")
        elif number(have) < number(oldest):
            if name in NEVER:
                raise ValueError(f"this container has {name} {have}, we need {oldest}: take a newer container, {name} is never replaced")
            out.append(f"{name}=={installed}")
    return out


def main(file: str) -> None:
    before = version_of("torch")
    if before is None:
        sys.exit("no torch in this container: take one of NVIDIA's tritonserver:*-trtllm-python-py3")
    packages = missing(Path(file).read_text())
    print("to install:", *packages or ["nothing"])  # noqa: T201
    if packages:
        subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", "--no-cache-dir", *packages], check=True)
    after = subprocess.check_output([sys.executable, "-c", "import importlib.metadata as m; print(m.version('torch'))"], text=True).strip()
    if after != before:
        sys.exit(f"torch was {before} and is {after} now: the container's torch must stay")


if __name__ == "__main__":
    main(sys.argv[1])
