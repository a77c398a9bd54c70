"""What assets and sensors are given: the settings of this stack. Knows where they are named, not what they mean."""

from pathlib import Path

import dagster as dg

from tide_pipeline import recipes
from tide_pipeline.config import TideConfig


class TideResource(dg.ConfigurableResource):
    """The settings, read when something runs and never at import: from `config_file`, else from the file that TIDE_CONFIG names."""

    config_file: str = ""

    def settings(self) -> TideConfig:
        return recipes.load(file=Path(self.config_file)) if self.config_file else recipes.from_environment()
