"""The draft that an engine ships with, as the first version in the registry: where every lineage begins."""

from __future__ import annotations

import json
from pathlib import Path

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import DraftCheckpoint
from tide_pipeline.engine_spec import load_engine_spec
from tide_pipeline.models.checkpoint import digest_draft, read_identity
from tide_pipeline.registry.registry import RegisteredDraft, Registry, open_registry

LABEL = "shipped"                  # its draft version is "shipped-<digest8>"
CHAMPION = "champion"


def shipped_checkpoint(config: TideConfig) -> DraftCheckpoint | None:
    """engines/<name>/champion as a record; None for an engine that ships no draft."""
    spec = load_engine_spec(config.engine_dir)
    folder = config.engine_dir / spec.champion
    if not spec.champion or not folder.is_dir():
        return None
    identity, facts = read_identity(folder), _facts(folder)
    return DraftCheckpoint(str(folder), digest_draft(folder), config.target, identity.engine_digest, "", int(facts.get("steps", 0)),
                           facts.get("train_s", 0.0), int(facts.get("windows", 0)), int(facts.get("rows", 0)),
                           facts.get("acceptance_length", 0.0))


def register_shipped(config: TideConfig, registry: Registry | None = None) -> RegisteredDraft | None:
    """Register the shipped draft (once) and let the champion alias point at it unless it points somewhere already."""
    checkpoint = shipped_checkpoint(config)
    if checkpoint is None:
        return None
    registry = registry or open_registry(config)
    draft = registry.register(checkpoint, lineage={"workload": "default", "origin": "shipped with the engine"}, label=LABEL)
    if registry.alias(CHAMPION) is None:
        registry.set_alias(CHAMPION, draft.version)
    return draft


def _facts(folder: Path) -> dict[str, float]:
    """Numbers of provenance.json; {} when there is none."""
    try:
        found = json.loads((folder / "provenance.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, int | float)}
