"""Who decides what is rolled out: the word in rollout.mode. Knows settings alone: the drift sensor asks, and loads no gate for it."""

from __future__ import annotations

from enum import StrEnum

from tide_pipeline.config import TideConfig
from tide_pipeline.errors import SettingsError


class Mode(StrEnum):
    """What becomes of a draft that passed the gate, without a person."""

    OBSERVE = "observe"            # nothing
    PROPOSE = "propose"            # a proposal in the record
    AUTO = "auto"                  # a rollout


def mode_of(config: TideConfig) -> Mode:
    """Raises SettingsError for another word."""
    try:
        return Mode(config.rollout.mode)
    except ValueError as error:
        raise SettingsError(f"rollout.mode is {config.rollout.mode!r}: choose {', '.join(Mode)}") from error
