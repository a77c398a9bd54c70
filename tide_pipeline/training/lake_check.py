"""Both datasets of a stack's lake read through, states held against the target that is served. Knows where they are; no single check."""

from __future__ import annotations

from tide_pipeline.capture.verify import EngineFacts, Verification, verify_acceptance, verify_signals
from tide_pipeline.config import TideConfig
from tide_pipeline.training.target_head import target_head_of


def check_lake(config: TideConfig) -> dict[str, Verification]:
    """By dataset. Raises LakeError when the lake can't be listed."""
    head = target_head_of(config)
    engine = EngineFacts(head.digest, head.shape.hidden_size, len(head.spec.capture_layers), head.lm_head_VD)
    return {"signals": verify_signals(config.state.signals, config.target, engine),
            "acceptance": verify_acceptance(config.state.acceptance, config.target)}
