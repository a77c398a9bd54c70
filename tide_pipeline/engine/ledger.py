"""What an engine counts since its start: requests, tokens, steps, time. Knows outcomes; decides nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Ledger:
    """Written by the engine's thread, read by any. Steps, drafted and accepted tokens are request-steps'."""

    finished: int = 0
    failed: int = 0
    tokens: int = 0                    # of outputs
    prompt_tokens: int = 0
    steps: int = 0
    verify_steps: int = 0
    drafted: int = 0
    accepted: int = 0
    sink_errors: int = 0
    on_ms: float = 0.0                 # in engine steps that drafted
    off_ms: float = 0.0
    depth_steps: Counter[int] = field(default_factory=Counter)     # engine steps by passes of the draft

    def request_steps(self, steps: int, verify_steps: int, drafted: int, accepted: int) -> None:
        """One step of a request, or several at once."""
        self.steps += steps
        self.verify_steps += verify_steps
        self.drafted += drafted
        self.accepted += accepted

    def engine_step(self, depth: int, ms: float) -> None:
        self.depth_steps[depth] += 1
        if depth:
            self.on_ms += ms
        else:
            self.off_ms += ms

    def stats(self) -> dict[str, Any]:
        """Its share of an `engine.protocol.EngineStats`, by field."""
        return {"requests_finished": self.finished, "requests_failed": self.failed, "tokens_out": self.tokens,
                "prompt_tokens": self.prompt_tokens, "target_steps": self.steps, "verify_steps": self.verify_steps,
                "drafted_tokens": self.drafted, "accepted_tokens": self.accepted, "speculation_on_s": self.on_ms / 1e3,
                "speculation_off_s": self.off_ms / 1e3, "sink_errors": self.sink_errors, "draft_length_steps": dict(self.depth_steps)}
