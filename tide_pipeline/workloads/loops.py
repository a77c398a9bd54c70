"""Whether generated text loops: looping text flatters every draft, so figures are split by it."""

from __future__ import annotations

from collections.abc import Sequence

MAX_PERIOD = 16
WITHIN = 96                       # generated tokens looked at
REPEATED = 32                     # tokens at the end that must repeat


def is_looping(tokens: Sequence[int]) -> bool:
    """True when the last 32 of the first 96 generated tokens repeat with some period of 16 or less."""
    seen = tokens[:WITHIN]
    return any(len(seen) >= REPEATED + period and all(seen[i] == seen[i - period] for i in range(len(seen) - REPEATED, len(seen)))
               for period in range(1, MAX_PERIOD + 1))
