"""How the mix of domains changes while traffic runs. Knows domains by name only; draws are seeded.

A scenario maps progress (0 .. 1 of the run) to the share of each domain.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence

from tide_pipeline.workloads.prompts import Prompt

Mix = Mapping[str, float]
Scenario = Callable[[float], Mix]


def steady(domain: str) -> Scenario:
    return lambda progress: {domain: 1.0}


def abrupt(before: str, after: str, at: float = 0.5) -> Scenario:
    """All traffic changes at once."""
    return lambda progress: {before if progress < at else after: 1.0}


def gradual(before: str, after: str, start: float = 0.25, end: float = 0.75) -> Scenario:
    """The share of `after` rises in a straight line between start and end."""
    def mix(progress: float) -> Mix:
        share = min(1.0, max(0.0, (progress - start) / (end - start)))
        return {before: 1.0 - share, after: share}
    return mix


def recurring(domains: Sequence[str], cycles: int) -> Scenario:
    """The domains in turn, `cycles` times over."""
    def mix(progress: float) -> Mix:
        turn = min(int(progress * cycles * len(domains)), cycles * len(domains) - 1)
        return {domains[turn % len(domains)]: 1.0}
    return mix


def draw(scenario: Scenario, prompts: Mapping[str, Sequence[Prompt]], count: int, seed: int = 0) -> Iterator[Prompt]:
    """`count` prompts. Each domain's prompts are used in order, so none repeats before all were used."""
    rng = random.Random(seed)  # noqa: S311 - traffic, not secrets
    used = dict.fromkeys(prompts, 0)
    for i in range(count):
        mix = scenario(i / max(count - 1, 1))
        domain = rng.choices(list(mix), weights=list(mix.values()))[0]
        yield prompts[domain][used[domain] % len(prompts[domain])]
        used[domain] += 1
