"""The two matrices of the target that training needs, read without its layers. Knows no draft.

V = target vocabulary, D = hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tide_pipeline.config import EngineSpec, TideConfig, load_engine_spec
from tide_pipeline.models.checkpoint import DraftIdentity
from tide_pipeline.models.target import TargetShape, engine_digest, read_embeddings, read_shape


@dataclass(frozen=True)
class TargetHead:
    """Embeddings on the way in, lm_head on the way out, and the facts a draft has to agree with."""

    shape: TargetShape
    spec: EngineSpec
    digest: str                    # of the engine: target weights and captured layers
    embedding_VD: Tensor
    lm_head_VD: Tensor

    @property
    def identity(self) -> DraftIdentity:
        """What a draft trained with this head is for."""
        return DraftIdentity(self.spec.name, self.digest, self.spec.capture_layers)

    def to(self, device: str) -> TargetHead:
        """The same on another device."""
        return TargetHead(self.shape, self.spec, self.digest, self.embedding_VD.to(device), self.lm_head_VD.to(device))


def read_target_head(folder: Path, spec: EngineSpec) -> TargetHead:
    """Read embeddings and lm_head in fp32 from the target's folder; tied embeddings serve as both.

    Raises:
        CheckpointError: the folder is missing or cut short, or its embeddings do not fit its config.json.
    """
    shape = read_shape(folder)
    embedding, lm_head = read_embeddings(folder, shape)
    return TargetHead(shape, spec, engine_digest(folder, spec), embedding, lm_head)


def target_head_of(config: TideConfig) -> TargetHead:
    """The head of the engine that `config` names."""
    spec = load_engine_spec(config.engine_dir)
    return read_target_head(config.engine_dir / spec.model, spec)
