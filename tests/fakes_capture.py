"""Made-up engine traffic for the capture tests: a ring, requests, steps, and what should come out of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor

from tide_pipeline.capture.recorder import Recorder
from tide_pipeline.config import CaptureSettings
from tide_pipeline.contracts import FinishReason, RequestClosed, RequestOpened, SamplingParams, StepEvent, StepKind, TapHandle
from tide_pipeline.engine.taps import HostTapRing, StepRing

torch.set_num_threads(1)

HIDDEN, TAPS, TARGET, ENGINE = 4, 3, "pocket", "engine-digest"
SLOW = CaptureSettings(mode="on", flush_s=3600.0)      # shards only when a test flushes


def make_ring(*, with_final: bool = True) -> StepRing:
    return HostTapRing(hidden_size=HIDDEN, num_taps=TAPS, with_final=with_final)


def states_of(request_id: str, positions: Sequence[int], width: int) -> Tensor:
    """bf16 states that name their request and position, any finite bit pattern: fp16 would not hold them, nor two rows be alike."""
    seed = torch.tensor([[(sum(request_id.encode()) * 4096 + p) * 64 + column for column in range(width)] for p in positions])
    mixed = ((seed * 2654435761) >> 8) & 0xFF7F            # one exponent bit is never set: no infinity, no NaN
    return torch.where(mixed >= 2**15, mixed - 2**16, mixed).to(torch.int16).view(torch.bfloat16)


def token_at(request_id: str, position: int) -> int:
    """Few different tokens, so that a gap can't be told from tokens alone."""
    return (sum(request_id.encode()) * 31 + position * position * 7) % 3


@dataclass
class FakeEngine:
    """Feeds one recorder as an engine would: greedy truth is `token_at`, rejected drafts are truth + 1."""

    recorder: Recorder
    ring: StepRing = field(default_factory=make_ring)
    positions: dict[str, int] = field(default_factory=dict)        # request -> next row's position

    def __post_init__(self) -> None:
        self.recorder.attach(self.ring, ENGINE)

    def open(self, request_id: str, prompt_tokens: int, *, workload: str = "prose", tenant: str = "acme",
             sampling: SamplingParams | None = None) -> None:
        self.positions[request_id] = 0
        prompt = tuple(token_at(request_id, p) for p in range(prompt_tokens))
        self.recorder.on_open(RequestOpened(request_id, workload, tenant, prompt, sampling or SamplingParams(), "auto"))

    def prefill(self, request_id: str, rows: int, *, last: bool = True, lost: bool = False, told: bool = True) -> None:
        emitted = 1 if last else 0
        self._step(request_id, StepKind.PREFILL, rows, emitted, (), 0, lost=lost, told=told)

    def step(self, request_id: str, accepted: int, drafted: int, *, kind: StepKind = StepKind.VERIFY, version: str = "v1",
             lost: bool = False, told: bool = True) -> None:
        at = self.positions[request_id]
        draft = tuple(token_at(request_id, at + 1 + i) + (i >= accepted) for i in range(drafted))
        self._step(request_id, kind, accepted + 1, accepted + 1, draft, accepted, version=version, lost=lost, told=told)

    def close(self, request_id: str, reason: FinishReason = FinishReason.LENGTH, ttft_ms: float = 12.5) -> None:
        self.recorder.on_close(RequestClosed(request_id, reason, ttft_ms, 100.0, 5))
        self.recorder.on_idle()

    def run(self, request_id: str, prompt_tokens: int = 4, steps: int = 3, **kwargs: str) -> None:
        """A whole request: two accepted of three drafted, every step."""
        self.open(request_id, prompt_tokens, **kwargs)  # type: ignore[arg-type]
        self.prefill(request_id, prompt_tokens)
        for _ in range(steps):
            self.step(request_id, 2, 3)
        self.close(request_id)

    def _step(self, request_id: str, kind: StepKind, rows: int, emitted: int, draft: tuple[int, ...], accepted: int, *,
              version: str = "v1", lost: bool, told: bool) -> None:
        start = self.positions[request_id]
        self.positions[request_id] = start + rows
        if not told:
            return
        self.ring.next_slot()
        handle: TapHandle | None = None
        if not lost:
            states = states_of(request_id, range(start, start + rows), self.ring.width)
            split = HIDDEN * TAPS
            handle = self.ring.put(states[:, :split], states[:, split:] if self.ring.with_final else None)
        tokens = [token_at(request_id, p) for p in range(start, start + rows + 1)]
        self.recorder.on_step([StepEvent(
            request_id=request_id, kind=kind, start_pos=start, row_tokens=tuple(tokens[:rows]),
            emitted=tuple(tokens[-emitted:]) if emitted else (), drafted=draft, accepted=accepted, draft_version=version,
            draft_length=len(draft), batch_size=2, step_ms=1.5, taps=handle)])


def make_recorder(lake: Path, settings: CaptureSettings = SLOW, **kwargs: int) -> Recorder:
    return Recorder(settings, TARGET, lake, "replica-0", **kwargs)  # type: ignore[arg-type]
