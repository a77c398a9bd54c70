"""Which weights a run exports: the best by offline acceptance, of the live ones and their average. Knows no loss and no clock."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tide_pipeline.capture.reader import WindowStates
from tide_pipeline.contracts import SignalWindow
from tide_pipeline.training.acceptance import replay
from tide_pipeline.training.average import Average
from tide_pipeline.training.gradient import GradientMaker
from tide_pipeline.training.shares import Shares
from tide_pipeline.training.snapshot import Counters

LIVE, AVERAGED = "live", "averaged"


def newest_greedy(windows: Sequence[SignalWindow], count: int) -> list[SignalWindow]:
    """The windows that a draft is measured on: the newest greedy ones, or sampled ones where there are no greedy ones."""
    return ([w for w in windows if w.temperature == 0] or list(windows))[-count:]


class Selection:
    """Measures, and keeps a copy of the best so far."""

    def __init__(self, maker: GradientMaker, average: Average, draft_length: int, shares: Shares) -> None:
        self.draft, self.head, self.average = maker.draft, maker.head, average
        self.draft_length, self.shares, self.team = draft_length, shares, shares.team
        self.best: dict[str, Tensor] = {}

    def measure(self, mine: Sequence[WindowStates], c: Counters) -> dict[str, float]:
        """Acceptance of the live and of the averaged weights; sets the counters' last and best."""
        found = {LIVE: self.acceptance_on(mine)}
        self._offer(LIVE, found[LIVE], c)
        if self.average.decay > 0 and c.step > 0:
            live = self._weights()
            self.draft.load_state_dict(self.average.held, strict=False)
            self.shares.hand_out()
            found[AVERAGED] = self.acceptance_on(mine)
            self._offer(AVERAGED, found[AVERAGED], c)
            self.draft.load_state_dict(live)
        c.last_acceptance = max(found.values())
        c.stale_evaluations = 0 if c.best_step == c.step else c.stale_evaluations + 1
        return found

    def acceptance_on(self, mine: Sequence[WindowStates]) -> float:
        """Over the windows of all processes, of which `mine` are this one's; 1.0 without a step."""
        replays = list(replay(self.draft, self.head, mine, self.draft_length))
        counts = [sum(sum(r.accepted) for r in replays), sum(r.steps for r in replays)]
        steps = torch.tensor(counts, dtype=torch.float64, device=self.head.embedding_VD.device)      # also of a process without a window
        self.team.add_up([steps])
        return 1.0 + float(steps[0]) / max(float(steps[1]), 1.0)

    def _offer(self, source: str, acceptance: float, c: Counters) -> None:
        if c.best_step < 0 or acceptance > c.best_acceptance:
            c.best_acceptance, c.best_step, c.best_source = acceptance, c.step, source
            self.best = self._weights()

    def _weights(self) -> dict[str, Tensor]:
        """A copy in host memory: there is more of it."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.draft.state_dict().items()}
