"""Look again inside one tick. Dagster comes round to a sensor every 5 s, and what it nearly saw may be certain after one. Knows no rule.

A tick that lingers waits more than it works: it looks only when something new was written.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from tide_pipeline.errors import TideError

T = TypeVar("T")

AGAIN_S = 0.5

_log = logging.getLogger(__name__)


def linger(look: Callable[[], T], is_near: Callable[[T], bool], written: Callable[[], object], for_s: float) -> T:
    """What `look` returned last. While that `is_near`, it is called again whenever `written` changed, for at most `for_s` seconds.

    An error of the first look is raised; one of a later look ends the lingering with what was seen before.
    """
    until = time.monotonic() + for_s
    seen, before = look(), object()                    # what was written during the first look is new too
    while is_near(seen):
        if time.monotonic() + AGAIN_S > until:
            break
        time.sleep(AGAIN_S)
        try:
            if (now := written()) != before:
                before, seen = now, look()
        except TideError as error:
            _log.warning("not looked at again in this tick: %s", error)
            break
    return seen
