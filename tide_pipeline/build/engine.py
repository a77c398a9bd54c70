"""Make an EngineBuild: copy, verify, warm up, put in place. Knows folders; what an engine does with them is warmup.py's.

Work goes on in `builds/<target>/.making-*`, which is renamed to its build id and becomes a build when build.json, the last
file, is written. A process killed anywhere leaves a folder that nobody takes for a build and that the next one sweeps away.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tide_pipeline import recipes
from tide_pipeline.build import trtllm
from tide_pipeline.build.warmup import warm_up as warm_up_draft
from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import EngineBuild
from tide_pipeline.deployment.builds import CERTIFICATE, DRAFT_FILES, build_dir, load_build, save_build
from tide_pipeline.engine.trtllm.schedule_file import write_schedule
from tide_pipeline.engine_spec import EngineSpec, load_engine_spec
from tide_pipeline.errors import BuildError
from tide_pipeline.models.checkpoint import DraftIdentity, digest_draft, load_draft
from tide_pipeline.models.draft_files import check_draft
from tide_pipeline.models.target import engine_digest, read_shape
from tide_pipeline.provenance import write_json
from tide_pipeline.serve.repository import render_model_repository

MAKING = ".making-"
SETTINGS = "settings.toml"             # what the rendered model repository points at


def build_engine(config: TideConfig, draft_dir: Path, draft_version: str, *, warm_up: bool = True) -> EngineBuild:
    """The build of a draft on the configured engine; a draft that was built before gives that build.

    For TensorRT-LLM nothing is loaded and nothing warmed up: that takes the GPU it will be served on.

    Raises:
        SettingsError: engine.toml can't be rendered for its version of TensorRT-LLM.
        CheckpointError, EngineMismatch: the draft is damaged, or made for another engine.
        BuildError: the disk is full, the draft changed while it was copied, or the engine failed on it.
    """
    spec = load_engine_spec(config.engine_dir)
    lengths = trtllm.draft_lengths(config, spec, draft_version) if spec.backend == "trtllm" else None
    build = describe(config, spec, draft_dir, draft_version, lengths)
    with _refusing_disk(build.build_id), _alone(config.state.builds / config.target):
        existing = _existing(config, build.build_id)
        if existing is not None:
            return existing
        _check(config, spec, draft_dir, build)
        with _workshop(config.state.builds / config.target) as folder:
            _fill(config, spec, folder, draft_dir, build, lengths)
            if warm_up and spec.backend == "embedded":
                build = replace(build, warmup=warm_up_draft(config, spec, replace(build, path=str(folder))))
            _put_in_place(folder, Path(build.path))
        save_build(build)
        return load_build(config.state.builds, config.target, build.build_id)


def describe(config: TideConfig, spec: EngineSpec, draft_dir: Path, draft_version: str, lengths: trtllm.DraftLengths | None) -> EngineBuild:
    """What the build will be called and be made of; nothing is written."""
    draft, engine = digest_draft(draft_dir), engine_digest(config.engine_dir / spec.model, spec)
    served_by = trtllm.identity(config, spec, lengths.schedule) if lengths else spec.backend
    build_id = hashlib.sha256(f"{draft} {engine} {served_by}".encode()).hexdigest()[:16]
    return EngineBuild(build_id, config.target, spec.backend, str(build_dir(config.state.builds, config.target, build_id)), draft_version,
                       draft, engine, time.time())


def _check(config: TideConfig, spec: EngineSpec, draft_dir: Path, build: EngineBuild) -> None:
    """A draft that does not fit is refused before anything is written."""
    if spec.backend == "trtllm":
        check_draft(draft_dir, spec)
    else:
        identity = DraftIdentity(spec.name, build.engine_digest, spec.capture_layers)
        load_draft(draft_dir, read_shape(config.engine_dir / spec.model), identity)


def _fill(config: TideConfig, spec: EngineSpec, folder: Path, draft_dir: Path, build: EngineBuild,
          lengths: trtllm.DraftLengths | None) -> None:
    """Draft, settings and model repository. The repository names files by their final place."""
    (folder / "draft").mkdir()
    for name in (*DRAFT_FILES, "provenance.json"):
        if (draft_dir / name).is_file():
            shutil.copyfile(draft_dir / name, folder / "draft" / name)
    found = digest_draft(folder / "draft")
    if found != build.draft_digest:
        raise BuildError(f"the copy of {draft_dir} has digest {found[:12]}, expected {build.draft_digest[:12]}: "
                         "the draft changed while it was copied, build it again")
    recipes.freeze(config, folder / SETTINGS)
    place = Path(build.path)
    model_yaml = trtllm.model_yaml(config, spec, place / "draft", lengths.schedule) if lengths else ""
    render_model_repository(config, folder / "model_repository", replica=config.serve.replica, config_file=place / SETTINGS,
                            model_yaml=model_yaml)
    if lengths:
        if lengths.schedule and lengths.learned:
            write_schedule(folder, lengths.schedule, lengths.learned)
        write_json(folder / CERTIFICATE, trtllm.certificate(folder, config, spec, build, lengths))


def _existing(config: TideConfig, build_id: str) -> EngineBuild | None:
    """A whole build of this id. One that was altered or never finished is made again."""
    with contextlib.suppress(BuildError):
        return load_build(config.state.builds, config.target, build_id)
    return None


def _put_in_place(folder: Path, place: Path) -> None:
    """Sync what must last, then rename; something that is no build may lie there and goes."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
    if place.exists():
        place.rename(folder.with_name(folder.name + "-old"))
    folder.rename(place)


@contextlib.contextmanager
def _workshop(builds: Path) -> Iterator[Path]:
    """A fresh folder that is gone afterwards, with all that killed builders left. Only for who holds the lock."""
    folder = Path(tempfile.mkdtemp(prefix=MAKING, dir=builds))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        for left in builds.glob(f"{MAKING}*"):
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _alone(builds: Path) -> Iterator[None]:
    """One builder per target: a second one waits. The lock ends with its process."""
    builds.mkdir(parents=True, exist_ok=True)
    with (builds / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _refusing_disk(build_id: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BuildError(f"build {build_id} could not be written ({error.strerror or error}): free some space or check the permissions of "
                         "the state directory, then run `tide build` again; nothing of it is left behind") from error
