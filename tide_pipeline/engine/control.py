"""Decide the draft length of each step by what pays. Knows step times and acceptance; no network, no requests.

Expected tokens of one request at depth k, with a_i the chance that position i is accepted when i - 1 was:
    E[k] = 1 + a_1 + a_1 a_2 + ... + a_1 ... a_k
The depth that maximises sum(E[k]) / T_step(batch, k) is taken, 0 included. T_step is the measured time of a whole
step (drafting, verification and bookkeeping), not equation 5 of the TIDE paper, which promises 7-26 % too much.
While off, nothing is observed, so a bounded share of time is spent on probe steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from tide_pipeline.config import SpeculationSettings

PRIOR_STEPS = 6.0                # how many observations the prior is worth


class StepTimes:
    """T_step[ms] by (batch, depth): set by a profile at start, refreshed by every regular step."""

    def __init__(self, max_depth: int) -> None:
        self.max_depth = max_depth
        self._ms: dict[tuple[int, int], float] = {}

    def record(self, batch: int, depth: int, ms: float, weight: float = 0.05) -> None:
        """Fold in one measured step. A step that took over twice the known time (a busy machine) moves it little."""
        known = self._ms.get((batch, depth))
        if known is None:
            self._ms[batch, depth] = ms
        else:
            self._ms[batch, depth] = known + weight * (min(max(ms, 0.5 * known), 2.0 * known) - known)

    def ms(self, batch: int, depth: int) -> float | None:
        """Measured, or interpolated between the nearest measured batch sizes of the same depth."""
        if (batch, depth) in self._ms:
            return self._ms[batch, depth]
        known = sorted(b for b, d in self._ms if d == depth)
        below, above = [b for b in known if b < batch], [b for b in known if b > batch]
        if not below or not above:
            return self._ms[(below or above)[-1 if below else 0], depth] if known else None
        low, high = below[-1], above[0]
        share = (batch - low) / (high - low)
        return (1 - share) * self._ms[low, depth] + share * self._ms[high, depth]

    def table(self) -> dict[str, float]:
        return {f"b{b}k{d}": round(ms, 3) for (b, d), ms in sorted(self._ms.items())}


class Survival:
    """Acceptance of each draft position given that the one before was accepted; forgets with a fixed window."""

    def __init__(self, max_depth: int, window: int, prior: float) -> None:
        self._tried = [PRIOR_STEPS] * max_depth
        self._kept = [PRIOR_STEPS * prior * 0.95**i for i in range(max_depth)]
        self._keep = 1.0 - 1.0 / window

    def observe(self, drafted: int, accepted: int) -> None:
        for i in range(min(accepted + 1, drafted, len(self._tried))):      # a request may fix a length beyond the controller's
            self._tried[i] = self._tried[i] * self._keep + 1.0
            self._kept[i] = self._kept[i] * self._keep + (1.0 if i < accepted else 0.0)

    def rates(self) -> list[float]:
        return [kept / tried for kept, tried in zip(self._kept, self._tried, strict=True)]

    def expected_tokens(self) -> list[float]:
        """E[k] for k = 0..max_depth."""
        out, alive = [1.0], 1.0
        for rate in self.rates():
            alive *= rate
            out.append(out[-1] + alive)
        return out


class SpeculationController:
    """One per engine. Acceptance is kept per (workload, draft version): a new draft starts from the prior."""

    def __init__(self, settings: SpeculationSettings, max_depth: int) -> None:
        self.settings, self.max_depth = settings, min(max_depth, settings.max_draft_length)
        self.times = StepTimes(self.max_depth)
        self._survival: dict[tuple[str, str], Survival] = {}
        self._probe_credit_ms = 0.0
        self.probe_ms = 0.0

    def survival(self, workload: str, draft_version: str) -> Survival:
        key = (workload, draft_version)
        if key not in self._survival:
            self._survival[key] = Survival(self.max_depth, self.settings.survival_window, self.settings.prior_acceptance)
        return self._survival[key]

    def forget(self, draft_versions: set[str]) -> None:
        """Keep estimates of these drafts only."""
        self._survival = {key: value for key, value in self._survival.items() if key[1] in draft_versions}

    def choose(self, batch: int, drafting: Sequence[Survival]) -> int:
        """Depth for the requests whose estimates are given; `batch` counts all requests of the step."""
        if not drafting:
            return 0
        unmeasured = (depth for depth in range(self.max_depth + 1) if self.times.ms(batch, depth) is None)
        if (depth := next(unmeasured, None)) is not None:
            return depth                                   # tried once: what has no time could never be chosen
        plain_ms = self.times.ms(batch, 0) or 1.0
        idle = batch - len(drafting)
        expected = [estimate.expected_tokens() for estimate in drafting]
        best, best_rate = 0, batch / plain_ms * (1.0 + self.settings.switch_margin)
        for depth in range(1, self.max_depth + 1):
            step_ms = self.times.ms(batch, depth)
            rate = (idle + sum(e[depth] for e in expected)) / step_ms if step_ms else 0.0
            if rate > best_rate:
                best, best_rate = depth, rate
        return best

    def earn(self, step_ms: float) -> None:
        """A plain step earns its share of time for probes."""
        self._probe_credit_ms += step_ms * self.settings.probe_share

    def probe_due(self, batch: int, catch_up_ms: float) -> bool:
        """Whether the earned time pays for a probe of this batch now, catch-up of the draft's cache included."""
        plain, probe = self.times.ms(batch, 0), self.times.ms(batch, min(self.settings.probe_length, self.max_depth))
        if plain is None or probe is None:
            return False
        cost = max(probe - plain, 0.0) + catch_up_ms
        if self._probe_credit_ms < cost:
            return False
        self._probe_credit_ms -= cost
        self.probe_ms += cost
        return True
