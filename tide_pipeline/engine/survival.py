"""How likely draft tokens are to be accepted: by workload, by request, and by the draft's own confidence. Knows no costs and no network.

    rate of position j   given that the tokens before it were accepted
    chance S[j]          that the first j tokens are all accepted: the product of j rates

A workload's rates are of all its requests with one draft; a request's are what it showed lately, on top of its workload's.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence

PRIOR_STEPS = 6.0                # how many observations a prior is worth
REQUEST_KEEPS = 1.0 - 1.0 / 32   # of what a request showed, from step to step
BIN_EDGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96, 0.99)
BIN_MIDDLES = tuple((low + high) / 2 for low, high in zip((0.0, *BIN_EDGES), (*BIN_EDGES, 1.0), strict=True))
BIN_KEEPS = 1.0 - 1.0 / 500      # of what a bin showed, from token to token


class Calibration:
    """What a draft's confidence is worth: the share accepted of tokens that it gave about this probability."""

    def __init__(self) -> None:
        self._tried = [PRIOR_STEPS] * len(BIN_MIDDLES)
        self._kept = [PRIOR_STEPS * middle for middle in BIN_MIDDLES]

    def chance(self, confidence: float) -> float:
        i = bisect(BIN_EDGES, confidence)
        return self._kept[i] / self._tried[i]

    def observe(self, confidence: float, is_accepted: bool) -> None:
        i = bisect(BIN_EDGES, confidence)
        self._tried[i] = self._tried[i] * BIN_KEEPS + 1.0
        self._kept[i] = self._kept[i] * BIN_KEEPS + is_accepted


class Survival:
    """Rates of a workload with one draft; forgets by a window of steps.

    The prior of a position is the rate of the one before it: a depth that was never tried looks neither hopeless nor free.
    """

    def __init__(self, max_depth: int, window: int, prior: float) -> None:
        self.confidence = Calibration()
        self._prior, self._keep = prior, 1.0 - 1.0 / window
        self._tried, self._kept = [0.0] * max_depth, [0.0] * max_depth
        self._rates: list[float] = []                    # until the next observation

    def observe(self, drafted: int, accepted: int, confidences: Sequence[float] = ()) -> None:
        """A verified draft; `confidences` are its tokens' probabilities under the draft, where they were looked at."""
        self._rates = []
        for i in range(len(self._tried)):                # a request may fix a length beyond the controller's
            seen = i < min(accepted + 1, drafted)
            self._tried[i] = self._tried[i] * self._keep + seen
            self._kept[i] = self._kept[i] * self._keep + (seen and i < accepted)
        for i, confidence in enumerate(confidences[: min(accepted + 1, drafted)]):
            self.confidence.observe(confidence, i < accepted)

    def rates(self) -> list[float]:
        """By position. May be called from any thread."""
        if rates := self._rates:
            return rates
        rate, rates = self._prior, []
        for kept, tried in zip(self._kept, self._tried, strict=True):
            rate = (kept + PRIOR_STEPS * rate) / (tried + PRIOR_STEPS)
            rates.append(rate)
        self._rates = rates
        return rates


class RequestSurvival:
    """One request's. Unseen for long, it is as its workload."""

    def __init__(self, workload: Survival) -> None:
        self.workload = workload
        self._tried = [0.0] * len(workload.rates())
        self._kept = [0.0] * len(self._tried)
        self._unseen = 0                                 # steps since the last one that drafted

    def observe(self, drafted: int, accepted: int, confidences: Sequence[float] = ()) -> None:
        """A step of the request; `drafted` is 0 when nothing was verified for it."""
        self._unseen += 1
        if not drafted:
            return
        keep, self._unseen = REQUEST_KEEPS**self._unseen, 0
        for i in range(len(self._tried)):
            seen = i < min(accepted + 1, drafted)
            self._tried[i] = self._tried[i] * keep + seen
            self._kept[i] = self._kept[i] * keep + (seen and i < accepted)
        self.workload.observe(drafted, accepted, confidences)

    def chances(self) -> list[float]:
        """S[1..max]."""
        out, alive, keep = [], 1.0, REQUEST_KEEPS**self._unseen
        for kept, tried, rate in zip(self._kept, self._tried, self.workload.rates(), strict=True):
            alive *= (kept * keep + PRIOR_STEPS * rate) / (tried * keep + PRIOR_STEPS)
            out.append(alive)
        return out
