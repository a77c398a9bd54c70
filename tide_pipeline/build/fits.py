"""Whether a recipe's GPUs can do what it asks of them: memory and arithmetic. Knows settings and numbers, no machine."""

from __future__ import annotations

from tide_pipeline.config import TideConfig
from tide_pipeline.engine.gpus import gpu_named
from tide_pipeline.engine.memory import serving_memory, training_memory
from tide_pipeline.engine_spec import EngineSpec
from tide_pipeline.errors import SettingsError

MXFP4_BITS = 4.25
GB = 10**9


def serving_fits(spec: EngineSpec, config: TideConfig) -> str:
    """Whether the recipe's GPUs hold target, draft, buffers and enough cache. Raises SettingsError."""
    serve, gpu = config.serve, gpu_named(config.serve.gpu)
    if not gpu.has_bf16:
        raise SettingsError(f"{gpu.name} has no bf16: TensorRT-LLM serves from Ampere on. It can train, in fp32")
    if spec.trtllm.kv_dtype == "fp8" and not gpu.has_fp8:
        raise SettingsError(f'kv_dtype = "fp8" needs Ada or later, {gpu.name} is older: set it to "auto"')
    if spec.architecture.expert_bits == MXFP4_BITS and gpu.capability < (9, 0):
        raise SettingsError(f"{spec.name} has experts in MXFP4, which TensorRT-LLM's guide lists for Hopper and Blackwell alone, not for "
                            f"{gpu.name}: take h100 or h200")
    if spec.architecture.num_attention_heads % serve.gpus:
        raise SettingsError(f"gpus = {serve.gpus} does not divide {spec.architecture.num_attention_heads} attention heads: take a power of "
                            "two")
    m = serving_memory(spec, serve, gpu)
    if not m.fits:
        raise SettingsError(f"{serve.gpus} x {gpu.name}: {m.fixed / GB:.1f} of {gpu.memory / GB:.1f} GB are taken before the cache, which "
                            f"holds {m.kv_tokens} tokens; {m.needed_tokens} are needed (max_context {spec.max_context}, max_batch "
                            f"{serve.max_batch}). Raise serve.gpus, or lower serve.max_batch, serve.prefill_chunk or max_context")
    return f"{serve.gpus} x {gpu.name}: {m.fixed / GB:.1f} of {gpu.memory / GB:.1f} GB, and a cache of {m.kv_tokens:,} tokens"


def training_fits(spec: EngineSpec, config: TideConfig) -> str:
    """Whether one training GPU holds the draft's training. Raises SettingsError."""
    settings, gpu = config.training, gpu_named(config.training.gpu)
    if settings.autocast and not gpu.has_bf16:
        raise SettingsError(f"{gpu.name} has no bf16: set training.autocast = false")
    m = training_memory(spec, settings, gpu)
    if not m.fits:
        raise SettingsError(
            f"{gpu.name}: training takes {m.total / GB:.1f} GB, it has {gpu.memory / GB:.1f} ({m.activations / GB:.1f} GB are one row of "
            f"training.window_rows = {settings.window_rows} over training.ttt_steps = {settings.ttt_steps}): lower those, set "
            "training.optimizer = \"muon\" or training.draft_vocab_size, or take a larger GPU. More of training.train_devices share "
            f"the {m.kept / GB:.1f} GB of optimizer state alone")
    return f"{gpu.name}: {m.total / GB:.1f} of {gpu.memory / GB:.1f} GB"
