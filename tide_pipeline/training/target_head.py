"""The two matrices of the target that training needs, read without its layers. Knows no draft.

V = target vocabulary, D = hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tide_pipeline.config import EngineSpec, TideConfig, load_engine_spec
from tide_pipeline.errors import CheckpointError
from tide_pipeline.models.checkpoint import DraftIdentity
from tide_pipeline.models.target import TargetShape, engine_digest, read_shape

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


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
        CheckpointError: the folder is missing, cut short, or holds no Llama embeddings.
    """
    shape = read_shape(folder)
    file = folder / "model.safetensors"
    try:
        with safe_open(file, framework="pt") as tensors:
            names = set(tensors.keys())
            if EMBEDDING not in names:
                raise CheckpointError(f"{file} has no {EMBEDDING}: training needs a Hugging Face Llama checkpoint in one file")
            embedding: Tensor = tensors.get_tensor(EMBEDDING).to(torch.float32)
            lm_head: Tensor = tensors.get_tensor(LM_HEAD).to(torch.float32) if LM_HEAD in names else embedding
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} can't be read ({error}): fetch the target again") from error
    return TargetHead(shape, spec, engine_digest(folder, spec), embedding, lm_head)


def target_head_of(config: TideConfig) -> TargetHead:
    """The head of the engine that `config` names."""
    spec = load_engine_spec(config.engine_dir)
    return read_target_head(config.engine_dir / spec.model, spec)
