"""The two EMAs of Algorithm 1, over acceptances in the order of their arrival. Pure; decides nothing.

    ema_t = lambda * ema_(t-1) + (1 - lambda) * alpha_t          both begin at the mean of the first N_init values
"""

from __future__ import annotations

from tide_pipeline.config import CaptureSettings


class Emas:
    """`short` forgets sooner than `long`; both are 0 before the first value."""

    __slots__ = ("_s", "_total", "long", "seen", "short")

    def __init__(self, settings: CaptureSettings) -> None:
        self._s = settings
        self.seen, self._total = 0, 0.0            # the total is of the first N_init
        self.short = self.long = 0.0

    @property
    def remembers(self) -> bool:
        """Whether the long one holds as many values as its lambda speaks of."""
        return self.seen * (1 - self._s.ema_long) >= 1

    def update(self, acceptance: float) -> None:
        s = self._s
        self.seen += 1
        if self.seen <= s.init_requests:
            self._total += acceptance
            self.short = self.long = self._total / self.seen
        else:
            self.short = s.ema_short * self.short + (1 - s.ema_short) * acceptance
            self.long = s.ema_long * self.long + (1 - s.ema_long) * acceptance
