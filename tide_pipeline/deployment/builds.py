"""EngineBuild directories: `builds/<target>/<build id>/`. Knows files and digests; loads no weights.

    build.json             the EngineBuild record; written last, so a directory without it is not a build
    draft/                 the draft checkpoint (config.json, model.safetensors, provenance.json)
    model_repository/      the Triton model repository that serves it
    provenance.json        for TensorRT-LLM: what made it, and the digest of every other file
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from tide_pipeline.contracts import EngineBuild, from_json
from tide_pipeline.errors import BuildError, DigestMismatch
from tide_pipeline.provenance import digest_file, digest_files, write_json

DRAFT_FILES = ("config.json", "model.safetensors")
CERTIFICATE = "provenance.json"


def build_dir(builds: Path, target: str, build_id: str) -> Path:
    """Raises BuildError for a name that could leave the folder."""
    if not build_id.isalnum():
        raise BuildError(f"{build_id!r} is no build id: expected hexadecimal digits")
    return builds / target / build_id


def save_build(build: EngineBuild) -> None:
    """Write build.json: from now on the directory is a build. The path is not recorded: a build may be moved whole."""
    write_json(Path(build.path) / "build.json", {k: v for k, v in dataclasses.asdict(build).items() if k != "path"})


def read_build(builds: Path, target: str, build_id: str) -> EngineBuild:
    """What build.json says; the draft's bytes are not verified. Raises BuildError."""
    folder = build_dir(builds, target, build_id)
    try:
        return from_json(EngineBuild, (folder / "build.json").read_text(), path=str(folder))
    except FileNotFoundError as error:
        raise _missing(build_id, target, error) from error
    except (json.JSONDecodeError, TypeError) as error:
        raise BuildError(f"{folder / 'build.json'} can't be read: {error}") from error


def load_build(builds: Path, target: str, build_id: str) -> EngineBuild:
    """Read a build and verify its draft's bytes, and those of every certified file, against the recorded digests.

    Raises BuildError; DigestMismatch where it is whole and other bytes than were recorded.
    """
    build = read_build(builds, target, build_id)
    try:
        found = digest_files({name: Path(build.path) / "draft" / name for name in DRAFT_FILES})
    except FileNotFoundError as error:
        raise _missing(build_id, target, error) from error
    if found != build.draft_digest:
        raise DigestMismatch(f"build {build_id}: its draft was altered (digest {found[:12]}, recorded {build.draft_digest[:12]}): "
                             "make it again with `tide build`")
    if altered := _altered(Path(build.path), build.backend):
        raise DigestMismatch(f"build {build_id}: {altered} is missing or was altered since it was built: change engine.toml or the "
                             "settings instead, and make it again with `tide build`")
    return build


def _missing(build_id: str, target: str, error: FileNotFoundError) -> BuildError:
    return BuildError(f"build {build_id} of {target} is missing or incomplete ({error.filename}): make it again with `tide build`")


def _altered(folder: Path, backend: str) -> str:
    """The first certified file that is not what it was; "" for none. The draft was verified already."""
    if backend != "trtllm":
        return ""
    try:
        files: dict[str, str] = json.loads((folder / CERTIFICATE).read_text())["files"]
        return next((name for name, digest in files.items() if not name.startswith("draft/") and digest_file(folder / name) != digest), "")
    except FileNotFoundError as error:
        return Path(error.filename).name
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        return CERTIFICATE


def list_builds(builds: Path, target: str) -> list[EngineBuild]:
    """All complete builds, newest first; draft bytes are not verified here."""
    found = []
    for file in (builds / target).glob("*/build.json"):
        found.append(from_json(EngineBuild, file.read_text(), path=str(file.parent)))
    return sorted(found, key=lambda b: -b.created_at)
