"""Our ADWIN finds each fall that river's does (0.19.0, the last whose bounds on numpy and pandas meet ours), no later, and no other."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tide_pipeline.drift.adwin import Adwin

GOLDEN = json.loads((Path(__file__).parent / "adwin.json").read_text())


@pytest.mark.parametrize("stream", GOLDEN["streams"], ids=range(len(GOLDEN["streams"])))
def test_alarms_are_rivers_or_sooner(stream: dict[str, Any]) -> None:
    """It looks every 8 values where river looks every 32, and goes on speaking while the window sheds what no longer fits."""
    rng, adwin = random.Random(stream["seed"]), Adwin(0.002)
    levels = [level for level, count in stream["parts"] for _ in range(count)]
    alarms = [i for i, level in enumerate(levels) if adwin.update(rng.gauss(level, GOLDEN["spread"]))]
    falls = [i for i in range(1, len(levels)) if levels[i] < levels[i - 1]]
    for fall, rivers in zip(falls, stream["falls"], strict=True):
        assert fall < next(alarm for alarm in alarms if alarm >= fall) <= rivers
    assert all(any(fall < alarm < fall + 500 for fall in falls) for alarm in alarms), "alarms without a fall"
