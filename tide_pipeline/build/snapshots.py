"""Snapshots of hub repositories in an engine's folder: how to fetch one, which revision lies there. Fetches nothing itself.

`hf download --local-dir` leaves the commit of every file in `.cache/huggingface/download/<file>.metadata`; a folder filled otherwise says
nothing of its revision, and is believed.
"""

from __future__ import annotations

from pathlib import Path

from tide_pipeline.config import TideConfig
from tide_pipeline.engine_spec import EngineSpec
from tide_pipeline.errors import CheckpointError, EngineMismatch

DRAFT_FILES = "config.json model.safetensors"
TARGET_FILES = "'*.json' '*.safetensors' --exclude 'original/*' 'metal/*'"      # gpt-oss and Llama hold their weights twice


def fetch_line(repo: str, revision: str, files: str, folder: Path) -> str:
    """The command that brings a snapshot, at its revision."""
    return f"hf download {repo} --revision {revision} --include {files} --local-dir {folder}"


def check_revision(repo: str, revision: str, files: str, folder: Path) -> None:
    """Raises EngineMismatch when the folder tells of another revision."""
    try:
        found = (folder / ".cache/huggingface/download/config.json.metadata").read_text().split("\n")[0].strip()
    except OSError:
        return
    if found != revision:
        raise EngineMismatch(f"{folder} is a snapshot of {repo} at {found[:8]}, engine.toml names {revision[:8]}: move it away and "
                             f"{fetch_line(repo, revision, files, folder)}")


def starting_draft(config: TideConfig, spec: EngineSpec) -> Path:
    """The folder of the draft that an engine starts with. Raises CheckpointError that says how to get one."""
    folder = config.engine_dir / (spec.champion or "draft")
    if spec.champion and folder.is_dir():
        return folder
    scratch = f"{spec.name} starts without one. Train a draft with `tide train --from-scratch`, or name one with --draft DIR"
    how = fetch_line(spec.draft.repo, spec.draft.revision, DRAFT_FILES, folder) if spec.draft.repo else scratch
    raise CheckpointError(f"{folder} is not there: {how}")
