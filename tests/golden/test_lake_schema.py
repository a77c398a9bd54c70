"""The lake's columns as every reader sees them. A change here is a migration: raise SCHEMA_VERSION and say how old shards are read."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.fakes_capture import TARGET, FakeEngine, make_recorder
from tide_pipeline.capture.reader import live_shards
from tide_pipeline.capture.schema import SIGNALS_VERSION
from tide_pipeline.contracts import SCHEMA_VERSION

HERE = Path(__file__).parent


@pytest.mark.parametrize("dataset", ["signals", "acceptance"])
def test_parquet_schema(tmp_path: Path, dataset: str) -> None:
    recorder = make_recorder(tmp_path)
    FakeEngine(recorder).run("r")
    recorder.close()
    (shard,) = live_shards(tmp_path / dataset, TARGET)
    text = str(pq.read_metadata(shard).schema).split("\n", 1)[1].strip()      # the first line holds an address
    version = {"signals": SIGNALS_VERSION, "acceptance": SCHEMA_VERSION}[dataset]
    assert text == (HERE / f"lake_{dataset}_v{version}.txt").read_text().strip()
    assert set(pq.ParquetFile(shard).read(["schema_version"]).column(0).to_pylist()) == {version}
