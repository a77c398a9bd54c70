"""Settings that are lists: hashable, of the kind that is written beside them, and told by place where they are not."""

from __future__ import annotations

from typing import Any

import pytest

from tide_pipeline.config import TideConfig, override
from tide_pipeline.errors import SettingsError


def test_a_list_of_lists_is_hashable() -> None:
    """Sensors keep what they know of a target under its settings."""
    config = override(TideConfig(), {"speculation": {"draft_schedule": [[1, 3], [64, 1]]}})
    assert config.speculation.draft_schedule == ((1, 3), (64, 1)) and hash(config) == hash(override(config, {}))


def test_whole_numbers_will_do_for_shares() -> None:
    assert override(TideConfig(), {"rollout": {"steps": [0.5, 1]}}).rollout.steps == (0.5, 1.0)


@pytest.mark.parametrize(("table", "message"), [
    ({"speculation": {"draft_schedule": [[1, 3, 5]]}}, r"speculation\.draft_schedule\[0\]: expected a list of 2, got \[1, 3, 5\]"),
    ({"speculation": {"draft_schedule": [[1, "3"]]}}, r"speculation\.draft_schedule\[0\]\[1\]: expected int, got '3'"),
    ({"speculation": {"draft_schedule": [1]}}, r"speculation\.draft_schedule\[0\]: expected a list, got 1"),
    ({"rollout": {"steps": ["all"]}}, r"rollout\.steps\[0\]: expected float, got 'all'"),
    ({"capture": {"workloads": "de"}}, r"capture\.workloads: expected a list, got 'de'"),
])
def test_what_is_not_of_the_kind_is_refused_by_its_place(table: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        override(TideConfig(), table)
