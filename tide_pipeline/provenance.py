"""Atomic writes, digests and birth certificates. Knows files, not what is in them."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def digest_bytes(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest_files(paths: Mapping[str, Path]) -> str:
    """One digest over named files; the order of the mapping does not matter."""
    lines = [f"{name} {digest_file(paths[name])}" for name in sorted(paths)]
    return digest_bytes("\n".join(lines).encode())


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644, exclusive: bool = False) -> None:
    """Write beside `path`, fsync, then put it in place: readers see the old file, or the whole new one.

    With `exclusive` the file is linked rather than renamed: raises FileExistsError when `path` is there already.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, mode)
        if exclusive:
            os.link(temporary, path)
        else:
            os.replace(temporary, path)
            temporary = ""
    finally:
        if temporary:
            os.unlink(temporary)


def write_json(path: Path, value: Any, *, exclusive: bool = False) -> None:
    """`write_atomic` for JSON (indented, keys in the order given)."""
    write_atomic(path, (json.dumps(value, indent=2, default=str) + "\n").encode(), exclusive=exclusive)


def read_record(file: Path) -> dict[str, Any]:
    """A JSON object, for who goes on without it: {} where it is not there, can't be read or is something else."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def birth_certificate(**facts: Any) -> dict[str, Any]:
    """What made an artefact: the given facts, then time, code revision, versions and machine (no paths, no names)."""
    return {**facts, "created_at": time.time(), "git_sha": _git_sha(), "git_changes": _git_changes(), "packages": _versions(),
            "python": platform.python_version(), "machine": f"{platform.machine()} x{os.cpu_count()}"}


@functools.cache
def _git_sha() -> str:
    return _git("rev-parse", "HEAD").decode().strip() or "unknown"


@functools.cache
def _git_changes() -> str:
    """16 hex digits of what the package's tracked files differ in from the commit; "" where they don't."""
    changes = _git("diff", "HEAD", "--", Path(__file__).resolve().parent.name)
    return digest_bytes(changes)[:16] if changes else ""


def _git(*words: str) -> bytes:
    try:
        return subprocess.run(["git", *words], cwd=Path(__file__).resolve().parent.parent, capture_output=True, check=False).stdout
    except OSError:                                        # no git in the image
        return b""


def _versions() -> dict[str, str]:
    names = ("tide-pipeline", "torch", "safetensors", "pyarrow", "duckdb", "dagster", "mlflow")
    return {name: importlib.metadata.version(name) for name in names if _installed(name)}


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
