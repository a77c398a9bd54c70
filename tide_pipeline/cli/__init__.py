"""`tide`: every stage by hand. Wires options to functions; what they do is theirs. Heavy imports stay inside the commands."""

from tide_pipeline.cli import deploy, draft, drafts, drift, importing, lake, loop, signals, traffic
from tide_pipeline.cli.app import app, main

__all__ = ["app", "deploy", "draft", "drafts", "drift", "importing", "lake", "loop", "main", "signals", "traffic"]
