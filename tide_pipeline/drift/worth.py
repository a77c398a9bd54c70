"""Is an adaptation worth its price? Expected tokens per second gained against tokens lost while training. Pure.

At a given draft depth k a step takes the same time whatever is accepted, so throughput goes with acceptance length. With r the
first-position rate, and the same rate at every position (later ones are a little lower: this counts gains a little high):
    length(r) = 1 + r + r^2 + ... + r^k
    gain      = tokens/s of the workload * (length(r + recovery * drop) / length(r) - 1)
    price     = tokens/s of everything served * slowdown * training time
"""

from __future__ import annotations

from dataclasses import dataclass

from tide_pipeline.config import TideConfig

RECOVERY = 0.75                    # share of a drop that one adaptation wins back: what docs/training.md measures after 60 s of training


@dataclass(frozen=True, slots=True)
class Price:
    """What is assumed of an adaptation."""

    train_s: float
    slowdown: float                # share of serving lost while it trains
    pay_back_s: float              # within which it has to earn its price; 0 is never asked
    depth: int                     # of the draft
    recovery: float = RECOVERY

    @classmethod
    def of(cls, config: TideConfig) -> Price:
        return cls(config.training.time_budget_s, config.drift.training_slowdown, config.drift.pay_back_s, config.gate.draft_length)


@dataclass(frozen=True, slots=True)
class Worth:
    """In tokens."""

    gain_per_s: float
    price: float
    is_worth: bool
    reason: str                    # one sentence with the numbers

    @property
    def pay_back_s(self) -> float:
        return self.price / self.gain_per_s if self.gain_per_s > 0 else float("inf")


def length(rate: float, depth: int) -> float:
    """Acceptance length, bonus token included."""
    return 1.0 + sum(rate**i for i in range(1, depth + 1))


def gain_share(rate: float, drop: float, price: Price) -> float:
    """By how much throughput rises when a draft wins back its share of the drop."""
    after = min(1.0, rate + price.recovery * max(0.0, drop))
    return length(after, price.depth) / length(rate, price.depth) - 1.0


def worth(*, rate: float, drop: float, tokens_per_s: float, all_tokens_per_s: float, price: Price) -> Worth:
    """Of adapting one workload, at the traffic it has now."""
    gain = tokens_per_s * gain_share(rate, drop, price)
    cost = all_tokens_per_s * price.slowdown * price.train_s
    is_worth = price.pay_back_s == 0 or cost <= gain * price.pay_back_s
    says = "pays back" if is_worth else "not worth it:"
    times = f"in {_time(cost / gain)}" if gain > 0 else "never"
    return Worth(gain, cost, is_worth, f"{says} {cost:,.0f} tokens of training {times}, at {gain:.1f} tokens/s more on {tokens_per_s:.1f}"
                                       + ("" if is_worth else f" (drift.pay_back_s is {_time(price.pay_back_s)})"))


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
