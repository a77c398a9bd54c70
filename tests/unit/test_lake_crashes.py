"""Writers that die: every reader sees whole shards, all that was promised, and no row twice."""

from __future__ import annotations

import random
import resource
import time
from pathlib import Path

from tests.fakes_capture import TARGET, FakeEngine, make_recorder
from tests.fakes_drift import config_in
from tests.lake_children import die_at_every_step, requests_in, start, told, wait_for, write_for_ever, write_one
from tide_pipeline.capture.layout import survey
from tide_pipeline.drift.views import query


def test_writers_killed_at_random_moments(tmp_path: Path) -> None:
    config, chance = config_in(tmp_path), random.Random(4)
    lake = config.state.lake
    lake.parent.mkdir()
    for i in range(4):
        writer = start(write_for_ever, lake, f"w{i}")
        wait_for(lambda name=f"w{i}-0": name in told(lake))
        time.sleep(chance.uniform(0.0, 0.1))
        writer.kill()                                      # SIGKILL
        writer.join()
        seen = requests_in(lake)
        assert told(lake) <= set(seen), "what was flushed is there"
        assert set(seen.values()) <= {1}
    assert len(seen) >= 4, "they did write"
    rows = query(config, "select request_id, count(*) from requests group by 1")[1]
    assert told(lake) <= {name for name, _ in rows} and {count for _, count in rows} == {1}
    assert query(config, "from skipped")[1] == []


def test_a_writer_that_dies_at_every_step_leaves_a_whole_shard_or_none(tmp_path: Path) -> None:
    lakes = die_at_every_step(tmp_path / "lakes", write_one)
    found = [len(requests_in(lake)) for lake in lakes]
    assert len(lakes) > 15 and set(found) == {0, 1} and found == sorted(found) and found[-1] == 1
    assert all(len(survey(lake / "signals", TARGET).leftovers) + seen <= 1 for lake, seen in zip(lakes, found, strict=True))


def _fill_the_disk(lake: Path) -> None:
    """A file-size limit cuts the shard off in its middle, as a full disk does."""
    recorder = make_recorder(lake)
    FakeEngine(recorder).run("fits")
    assert recorder.flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, resource.RLIM_INFINITY))
    FakeEngine(recorder).run("does not", steps=300)
    assert not recorder.flush() and "signals: OSError" in str(recorder.stats()["writer_error"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert recorder.flush() and recorder.stats()["writer_error"] == ""


def test_a_disk_that_fills_up_inside_a_shard(tmp_path: Path) -> None:
    child = start(_fill_the_disk, tmp_path)
    child.join(60)
    assert child.exitcode == 0
    assert requests_in(tmp_path) == {"fits": 1, "does not": 1}
    assert survey(tmp_path / "signals", TARGET).leftovers == []
