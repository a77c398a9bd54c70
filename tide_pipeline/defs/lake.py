"""Assets that the serving engine writes by itself: Dagster observes them and never makes them."""

from collections.abc import Iterator

import dagster as dg

from tide_pipeline.config import TideConfig
from tide_pipeline.defs.resources import TideResource

GROUP = "lake"

acceptance_log = dg.AssetSpec(
    "acceptance_log", group_name=GROUP, kinds={"parquet"}, owners=["team:serving"],
    description="What became of every drafted token, per request and block of steps: counts and times, nothing textual. Always on. "
                "The drift sensor judges it.")

signal_windows = dg.AssetSpec(
    "signal_windows", group_name=GROUP, kinds={"parquet"}, owners=["team:serving"],
    description="Hidden states of accepted tokens, kept by the engine while its acceptance is low. What a draft is trained on.")


@dg.multi_observable_source_asset(specs=[acceptance_log, signal_windows], name="signal_lake")
def signal_lake(tide: TideResource) -> Iterator[dg.ObserveResult]:
    """Look now; the drift sensor does the same every few seconds."""
    for name, facts in lake_facts(tide.settings()).items():
        yield dg.ObserveResult(asset_key=name, metadata=facts)


def lake_facts(config: TideConfig) -> dict[str, dict[str, float]]:
    """Asset name -> numbers to plot."""
    raise NotImplementedError
