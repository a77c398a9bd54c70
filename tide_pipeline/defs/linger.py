"""Look again inside one tick. Dagster comes round to a sensor every 5 s, and what it nearly saw may be certain after one. Knows no rule.

A tick that lingers waits more than it works: it looks only when something new was written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

AGAIN_S = 0.5


def linger(look: Callable[[], T], is_near: Callable[[T], bool], written: Callable[[], object], for_s: float) -> T:
    """What `look` returned last. It is called again whenever `written` changed, while its answer `is_near`, for at most `for_s` seconds."""
    until, before = time.monotonic() + for_s, written()
    seen = look()
    while is_near(seen) and time.monotonic() + AGAIN_S <= until:
        time.sleep(AGAIN_S)
        if (now := written()) != before:
            before, seen = now, look()
    return seen
