"""Assets that the serving engine writes by itself: Dagster observes them and never makes them."""

import time
from datetime import timedelta
from pathlib import Path

import dagster as dg

from tide_pipeline.config import TideConfig
from tide_pipeline.defs.keys import key_of

GROUP = "draft_loop"               # of all assets: Dagster draws a single group open, so the loop is seen at once
HOUR_S = 3600.0
HOURS = dg.HourlyPartitionsDefinition("2026-01-01-00:00", end_offset=1)      # the lake's date=/hour= folders, UTC; with the current one

acceptance_log = dg.AssetSpec(
    "acceptance_log", group_name=GROUP, kinds={"parquet"}, owners=["team:serving"], partitions_def=HOURS,
    freshness_policy=dg.FreshnessPolicy.time_window(warn_window=timedelta(hours=1), fail_window=timedelta(days=1)),
    description="What became of every drafted token, per request and block of steps: counts and times, nothing textual. Always on; "
                "the drift sensor judges it.")

signal_windows = dg.AssetSpec(
    "signal_windows", deps=[acceptance_log], group_name=GROUP, kinds={"parquet"}, owners=["team:serving"], partitions_def=HOURS,
    freshness_policy=dg.FreshnessPolicy.time_window(warn_window=timedelta(days=7), fail_window=timedelta(days=30)),    # idle if all is well
    description="Hidden states of accepted tokens, collected by the engine while acceptance is low. What a draft is trained on.")


def look(config: TideConfig) -> list[dg.AssetObservation]:
    """What is in the lake now, as numbers that plot; sums are of the last hour, so that looking costs the same after a year.

    Raises LakeError when the lake can't be read.
    """
    from tide_pipeline.drift.series import live

    since, state = time.time() - HOUR_S, config.state
    now = live(config, config.drift.recent_s)
    rates = {"acceptance_length": now.acceptance_length, "first_position_rate": now.first_position_rate} if now.drafted_share > 0 else {}
    return [
        dg.AssetObservation(key_of("acceptance_log"), metadata={
            **rates, "drafted_share": now.drafted_share, "tokens_per_s": now.tokens_per_s, "requests": now.requests,
            "bytes_last_hour": _bytes(state.acceptance, config.target, since)}),
        dg.AssetObservation(key_of("signal_windows"), metadata={
            "rows_last_hour": _rows(state.signals, config.target, since), "bytes_last_hour": _bytes(state.signals, config.target, since)}),
    ]


def _rows(signals: Path | str, target: str, since: float) -> int:
    from tide_pipeline.capture.reader import count_rows

    return count_rows(signals, target, since=since)


def _bytes(root: Path | str, target: str, since: float) -> int:
    """Of live shards written since."""
    from tide_pipeline.capture.layout import live_shards

    return sum(shard.size for shard in live_shards(root, target, since))
