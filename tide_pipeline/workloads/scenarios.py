"""How the mix of domains changes while traffic runs. Knows domains by name only; draws are seeded.

A scenario maps progress to the share of each domain: 0 .. 1 is its length; beyond, it stays as it ended (recurring: goes round again).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum

from tide_pipeline.errors import InvalidRequest
from tide_pipeline.workloads.prompts import Prompt

Mix = Mapping[str, float]
Scenario = Callable[[float], Mix]

CYCLES = 2                         # times that each domain has its turn in a recurring scenario


class Shape(StrEnum):
    STEADY = "steady"
    ABRUPT = "abrupt"
    GRADUAL = "gradual"
    RECURRING = "recurring"


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


def recurring(domains: Sequence[str], cycles: int = CYCLES) -> Scenario:
    """The domains in turn, `cycles` times over."""
    return lambda progress: {domains[int(progress * cycles * len(domains)) % len(domains)]: 1.0}


def scenario_of(shape: Shape, domains: Sequence[str]) -> Scenario:
    """A scenario over these domains, in this order. Raises InvalidRequest when they are too few, too many or not different."""
    if len(set(domains)) < len(domains):
        raise InvalidRequest(f"a scenario goes from one domain to another, got {' to '.join(domains)}: name each once")
    if shape is Shape.STEADY:
        if len(domains) != 1:
            raise InvalidRequest("steady traffic stays with one domain: leave out --to, or choose --scenario abrupt, gradual or recurring")
        return steady(domains[0])
    if len(domains) < 2:
        raise InvalidRequest(f"traffic of scenario {shape} changes from one domain to another: say to which with --to NAME")
    if shape is Shape.RECURRING:
        return recurring(domains)
    if len(domains) > 2:
        raise InvalidRequest(f"scenario {shape} goes to one other domain, got {', '.join(domains[1:])}: pass one --to, or choose recurring")
    return (abrupt if shape is Shape.ABRUPT else gradual)(domains[0], domains[1])


def draw(scenario: Scenario, prompts: Mapping[str, Sequence[Prompt]], length: int, seed: int = 0) -> Iterator[Prompt]:
    """Prompts without end; the first `length` of them play the scenario. A domain's prompts come in order: none twice before all did."""
    rng = random.Random(seed)  # noqa: S311 - traffic, not secrets
    waiting = {domain: itertools.cycle(found) for domain, found in prompts.items()}
    for i in itertools.count():
        mix = scenario(i / length)
        domain = rng.choices(list(mix), weights=list(mix.values()))[0]
        yield next(waiting[domain])
