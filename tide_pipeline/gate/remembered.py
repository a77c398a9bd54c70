"""What the champion does on the held-out windows, worked out before its challenger is there. Knows one file of numbers, and no verdict.

While a draft trains, `remember` replays the one that it shall replace; called again, it replays what was captured since. The gate then has
the challenger alone to replay. A replay follows from the draft's bytes, the target's, the draft length and the window: the file names them
by their digests, and what it does not know is replayed as if it were not there.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tide_pipeline.capture.reader import WindowStates, identity
from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import EngineBuild, SignalWindow
from tide_pipeline.gate.offline import load_built, replay_device, windows_to_judge_on
from tide_pipeline.models.eagle3 import Eagle3Draft
from tide_pipeline.provenance import digest_bytes, write_json
from tide_pipeline.training.acceptance import Head, Replay, replay_windows
from tide_pipeline.training.data import read_fitting
from tide_pipeline.training.target_head import target_head_of

Walk = tuple[float, tuple[float, ...]]     # steps; per position, those that accepted the token there


@dataclass
class Remembered:
    """Replays of one draft by window. Without a file it remembers nothing from before."""

    file: Path | None
    of: str                                # draft and target, by digest
    draft_length: int
    walks: dict[str, Walk] = field(default_factory=dict)

    @classmethod
    def open(cls, file: Path | None, draft_digest: str, target_digest: str, draft_length: int) -> Remembered:
        """Empty where the file is missing, damaged, or about another draft."""
        memory = cls(file, f"{draft_digest} on {target_digest}", draft_length)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(file.read_text()) if file else {}
            if (found["of"], found["draft_length"]) == (memory.of, draft_length):
                memory.walks = {name: (float(steps), tuple(map(float, accepted))) for name, (steps, accepted) in found["walks"].items()}
        return memory

    def __contains__(self, window: SignalWindow) -> bool:
        return _name(window) in self.walks

    def replay(self, draft: Callable[[], Eagle3Draft], head: Head, states: Sequence[WindowStates]) -> list[Replay]:
        """As training/acceptance.py's `replay`, in the order of `states`; only windows that are not known cost anything, and the draft."""
        if new := [s for s in states if s.window not in self]:
            self.walks |= {_name(s.window): (one.steps, one.accepted) for s, one in replay_windows(draft(), head, new, self.draft_length)}
        known = ((s.window, s.num_rows, *self.walks[_name(s.window)]) for s in states if s.window in self)
        return [Replay(w.prompt_digest, w.workload, w.temperature, steps, accepted, rows) for w, rows, steps, accepted in known]

    def save(self, windows: Iterable[SignalWindow]) -> None:
        """Keep these windows and forget all others."""
        assert self.file is not None
        kept: Collection[str] = {_name(w) for w in windows}
        write_json(self.file, {"of": self.of, "draft_length": self.draft_length,
                               "walks": {name: walk for name, walk in self.walks.items() if name in kept}})


def remember(config: TideConfig, champion: EngineBuild, file: Path, *, workload: str, focus_since: float = 0.0) -> int:
    """Replay `champion` on those windows that the gate would judge on now and `file` does not know; how many they were.

    None where the gate replays on the training GPU: the draft in training has it now, and the gate needs it for seconds.

    Raises:
        NotEnoughSignals, EngineMismatch, CheckpointError: as the gate would.
    """
    if replay_device(config, champion.backend) != "cpu":
        return 0
    torch.set_num_threads(config.serve.threads)
    head = target_head_of(config)
    memory = Remembered.open(file, champion.draft_digest, head.digest, config.gate.draft_length)
    windows = windows_to_judge_on(config, head, workload, focus_since)
    states = read_fitting([w for w in windows if w not in memory], head)
    if states:
        memory.replay(lambda: load_built(head, champion), head, states)
        memory.save(windows)
    return len(states)


def _name(window: SignalWindow) -> str:
    """The same for a window wherever the lake's maintenance moves it; tells nothing about its request."""
    return digest_bytes(json.dumps(identity(window)).encode())[:32]
