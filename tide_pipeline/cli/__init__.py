"""`tide`: every stage by hand. Wires options to functions; what they do is theirs. Heavy imports stay inside the commands."""

from tide_pipeline.cli import deploy, doctor, draft, drafts, drift, engines, importing, lake, loop, rollout, signals, top, traffic
from tide_pipeline.cli.app import app, main

__all__ = ["app", "deploy", "doctor", "draft", "drafts", "drift", "engines", "importing", "lake", "loop", "main", "rollout", "signals",
           "top", "traffic"]
