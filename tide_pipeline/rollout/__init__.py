"""From a build with a passing verdict to live traffic: canary, bake, the rest, or the way back. Every step is one appended record."""

from tide_pipeline.rollout.undo import rollback

__all__ = ["rollback"]
