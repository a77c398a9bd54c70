"""`engines/<name>/engine.toml`: which target is served, on what, and what of it is captured. Standard library only."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tide_pipeline.config import load_toml, parse


@dataclass(frozen=True)
class Architecture:
    """Numbers of a target's config.json, under its names: what memory follows from where no weights are at hand."""

    hidden_size: int = 0               # 0: not stated, the weights are here
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    intermediate_size: int = 0         # of one expert where there are experts
    vocab_size: int = 0
    max_position_embeddings: int = 0
    rope_theta: float = 0.0
    rms_norm_eps: float = 0.0
    tie_word_embeddings: bool = False
    qk_norm: bool = False              # a norm on every query and key head
    biased: bool = False               # attention, router and experts have biases, attention has sinks (gpt-oss)
    num_experts: int = 0               # 0: a dense MLP
    experts_per_token: int = 0
    weight_bits: float = 16.0
    expert_bits: float = 16.0          # MXFP4 is 4.25: 4 and a shared scale of 8 for every 32


@dataclass(frozen=True)
class StartingDraft:
    """The draft from the public hub that an engine starts with, or the sizes of the one to train from scratch (`repo` empty)."""

    repo: str = ""
    revision: str = ""                 # commit hash: a branch moves
    intermediate_size: int = 0         # 0: the target's
    vocab_size: int = 0                # draft_vocab_size; 0: the target's
    has_lm_head: bool = True           # False: it uses the target's (NVIDIA's drafts of gpt-oss)


@dataclass(frozen=True)
class TrtllmSettings:
    """What TensorRT-LLM is told beyond what follows from the rest. Names of ours: engine/trtllm/options.py maps them for each version."""

    dtype: str = "auto"                # of the weights; auto: as in the checkpoint
    kv_fraction: float = 0.85          # of the memory that is free once weights and buffers are there
    kv_dtype: str = "auto"             # fp8 halves the cache
    kv_reuse: bool = True              # a shared beginning is computed once; a captured window then begins behind it
    chunked_prefill: bool = True
    stream_interval: int = 1           # tokens between two streamed chunks; 1 lets a client count steps
    orchestrator: str = ""             # of more than one GPU; capture needs "ray" there (prototype in TensorRT-LLM)
    extra: dict[str, Any] = field(default_factory=dict)     # more LLM arguments, checked against the version's fields


@dataclass(frozen=True)
class EngineSpec:
    """`engines/<name>/engine.toml`: which target is served and what of it is captured."""

    name: str
    backend: str                       # embedded | trtllm
    model: str                         # Hugging Face folder, relative to engine.toml
    revision: str                      # commit hash where `repo` is set
    capture_layers: tuple[int, ...]    # 0-based layer outputs, low, middle, high
    soft_targets: bool                 # store the final state too
    champion: str                      # folder of the draft to start with, relative; "" for none
    max_context: int                   # prompt and output tokens together
    max_draft_length: int
    repo: str = ""                     # on the Hugging Face hub; then `model` is only where a snapshot of it may lie
    architecture: Architecture = field(default_factory=Architecture)
    draft: StartingDraft = field(default_factory=StartingDraft)
    trtllm: TrtllmSettings = field(default_factory=TrtllmSettings)

    @property
    def reference_digest(self) -> str:
        """What captured states depend on, for a target named by its revision: engine_digest where no bytes are read. 16 hex digits."""
        text = f"{self.repo}@{self.revision} layers={self.capture_layers} final={self.soft_targets}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_engine_spec(engine_dir: Path) -> EngineSpec:
    """Read and check `engine.toml`. Raises SettingsError."""
    return parse(EngineSpec, load_toml(engine_dir / "engine.toml"), str(engine_dir / "engine.toml"))
