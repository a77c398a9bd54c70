"""Our change-point test gives its alarms where river's does (serving has no room for river itself)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tide_pipeline.capture.change import PageHinkley

GOLDEN = json.loads((Path(__file__).parent / "page_hinkley.json").read_text())


@pytest.mark.parametrize("stream", GOLDEN["streams"], ids=range(len(GOLDEN["streams"])))
def test_alarms_are_rivers(stream: dict[str, object]) -> None:
    change = PageHinkley(stream["delta"], stream["threshold"])                 # type: ignore[arg-type]
    assert [i for i, value in enumerate(stream["values"]) if change.update(value)] == stream["alarms"]      # type: ignore[arg-type, var-annotated]


def test_some_streams_have_alarms() -> None:
    assert sum(bool(stream["alarms"]) for stream in GOLDEN["streams"]) >= 3
