"""The two matrices of the target that training needs, read without its layers. Knows no draft.

V = target vocabulary, D = hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tide_pipeline.config import TideConfig
from tide_pipeline.engine.memory import draft_sizes
from tide_pipeline.engine_spec import EngineSpec, load_engine_spec
from tide_pipeline.models.checkpoint import DraftIdentity
from tide_pipeline.models.layers import Heads
from tide_pipeline.models.rope import Rope
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
    """Read embeddings and lm_head in fp32 from the target's folder; tied embeddings serve as both. Quantised layers are not read.

    Raises:
        CheckpointError: the folder is missing or cut short, or its embeddings do not fit its config.json.
    """
    shape = _shape_of(spec) if spec.repo else read_shape(folder)
    embedding, lm_head = read_embeddings(folder, shape)
    return TargetHead(shape, spec, engine_digest(folder, spec), embedding, lm_head)


def _shape_of(spec: EngineSpec) -> TargetShape:
    """From the numbers in engine.toml: TensorRT-LLM serves networks that we do not run. The MLP is the draft's."""
    a = spec.architecture
    return TargetShape(a.hidden_size, a.num_hidden_layers, Heads(a.num_attention_heads, a.num_key_value_heads, a.head_dim),
                       draft_sizes(a, spec.draft).intermediate_size, a.vocab_size, a.max_position_embeddings, Rope(a.rope_theta),
                       a.rms_norm_eps, (), a.tie_word_embeddings, (), a.qk_norm, None)


def target_head_of(config: TideConfig) -> TargetHead:
    """The head of the engine that `config` names."""
    spec = load_engine_spec(config.engine_dir)
    return read_target_head(config.engine_dir / spec.model, spec)
