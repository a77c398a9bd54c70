"""What assets and sensors are given: the settings of this stack. Knows where they are named, not what they mean."""

from pathlib import Path

import dagster as dg

from tide_pipeline import recipes
from tide_pipeline.config import TideConfig
from tide_pipeline.defs.whereabouts import say_where


class TideResource(dg.ConfigurableResource):
    """The settings, read when something runs and never at import: from `config_file`, else from the file that TIDE_CONFIG names."""

    config_file: str = ""

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Of a run, before its first step: its worker says where it is."""
        if context.run is not None and context.instance is not None:
            say_where(context.instance, context.run.run_id)

    def settings(self) -> TideConfig:
        return recipes.load(file=Path(self.config_file)) if self.config_file else recipes.from_environment()
