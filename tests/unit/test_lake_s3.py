"""The same lake in a bucket: moto's server, over HTTP, with the code that runs against S3. Nothing of the lake is replaced here."""

from __future__ import annotations

import random
import socket
import threading
import time
import urllib.request
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto import server

from tests.fakes_capture import ENGINE, HIDDEN, TAPS, TARGET, FakeEngine, make_recorder
from tide_pipeline.capture import store as store_module
from tide_pipeline.capture.compact import _damage, compact
from tide_pipeline.capture.delete import delete
from tide_pipeline.capture.index import windows_in
from tide_pipeline.capture.layout import live_shards, survey
from tide_pipeline.capture.reader import list_windows, read_states
from tide_pipeline.capture.retain import Retention, retain
from tide_pipeline.capture.schema import ACCEPTANCE_SCHEMA
from tide_pipeline.capture.store import away, is_away, open_store, unlisted
from tide_pipeline.capture.tombstones import read_tombstones
from tide_pipeline.capture.verify import EngineFacts, verify_acceptance, verify_signals
from tide_pipeline.config import CaptureSettings, TideConfig, override
from tide_pipeline.drift.shards import Part, find_damage, readable_shards
from tide_pipeline.drift.views import query, read
from tide_pipeline.errors import LakeAway, LakeError
from tide_pipeline.training.places import WindowReader
from tide_pipeline.training.stream import read_or_fail

FACTS = EngineFacts(ENGINE, HIDDEN, TAPS)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    moto = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    yield "http://{}:{}".format(*moto.get_host_and_port())
    moto.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A boto3 client of an empty bucket `lake`: what another tool sees."""
    for name, value in (("AWS_ENDPOINT_URL_S3", endpoint), ("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_REGION", raising=False)
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    client.create_bucket(Bucket="lake")
    yield client
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="lake"):
        for found in page.get("Contents", ()):
            client.delete_object(Bucket="lake", Key=found["Key"])
    client.delete_bucket(Bucket="lake")


@pytest.fixture
def config(tmp_path: Path) -> TideConfig:
    return override(TideConfig(), {"engine": TARGET, "state_dir": str(tmp_path / "state"), "lake": "s3://lake/tide"})


def write(lake: Any, *names: str, replica: str = "replica-0") -> None:
    recorder = make_recorder(lake)
    engine = FakeEngine(recorder)
    for name in names:
        engine.run(name, tenant=name.partition("_")[0])
    recorder.close()


def requests_in(lake: Any) -> Counter[str]:
    index = list_windows(lake / "signals", TARGET)
    assert index.skipped == [] and len(list(read_states(index.windows, strict=True))) == len(index.windows)
    return Counter(w.request_id for w in index.windows)


def keys(bucket: Any) -> list[str]:
    return [found["Key"] for found in bucket.list_objects_v2(Bucket="lake").get("Contents", ()) if found["Size"]]


def test_written_read_and_asked_in_sql(bucket: Any, config: TideConfig) -> None:
    lake = config.state.lake
    assert live_shards(lake / "signals", TARGET) == [] and query(config, "from requests")[1] == []
    write(lake, "acme_1", "acme_2")
    write(lake, "blub_1")
    assert requests_in(lake) == Counter(["acme_1", "acme_2", "blub_1"])
    assert all(w.uri.startswith("s3://lake/tide/signals/target=pocket/date=") for w in list_windows(lake / "signals", TARGET).windows)
    assert len(live_shards(lake / "signals", TARGET, since=time.time() - 3600)) == 2
    assert live_shards(lake / "signals", TARGET, since=time.time() + 7200) == []
    rows = query(config, "select tenant, any_value(target), count(*), sum(emitted_tokens)::int + count(*) from acceptance "
                         "group by 1 order by 1")[1]
    assert rows == [("acme", TARGET, 2, 20), ("blub", TARGET, 1, 10)]
    assert query(config, "select request_id, num_rows from signals where tenant = 'blub'")[1] == [("blub_1", 13)]
    date, hour = query(config, "select distinct date, hour from signals")[1][0]
    assert f"date={date}/hour={hour:02d}/" in keys(bucket)[0]
    assert verify_signals(lake / "signals", TARGET, FACTS).is_sound and verify_acceptance(lake / "acceptance", TARGET).is_sound


def test_compaction_deletion_and_retention(bucket: Any, config: TideConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tide_pipeline.capture.compact.MIN_SHARDS", 2)
    lake = config.state.lake
    for i in range(3):
        write(lake, f"acme_{i}", f"blub_{i}")
    everything = requests_in(lake)
    assert compact(lake).new_shards == 2 and requests_in(lake) == everything
    (shard,) = live_shards(lake / "signals", TARGET)
    assert len(survey(lake / "signals", TARGET).superseded) == 3
    done = delete(lake, request_id="acme_1", settle_s=0.0)
    assert done.signal_rows == 1 and shard not in live_shards(lake / "signals", TARGET)
    assert len(survey(lake / "signals", TARGET).superseded) == 0, "all of them were of that shard"
    assert requests_in(lake) == everything - Counter(["acme_1"])
    delete(lake, tenant="blub", settle_s=0.0)
    assert requests_in(lake) == Counter(["acme_0", "acme_2"]) and read_tombstones(lake / "signals")
    everything_stored = b"".join(bucket.get_object(Bucket="lake", Key=key)["Body"].read() for key in keys(bucket))
    assert b"acme_1" not in everything_stored and b"blub_" not in everything_stored and b"acme_2" in everything_stored
    assert retain(lake, Retention(signals_bytes=0), settle_s=0.0).left_bytes["signals"] == 0
    assert not [key for key in keys(bucket) if "signals/target" in key or "_maintenance" in key]


def test_writers_that_know_nothing_of_each_other(bucket: Any, config: TideConfig) -> None:
    lake = config.state.lake
    writers = [threading.Thread(target=write, args=(lake, f"w{i}_a", f"w{i}_b")) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert requests_in(lake) == Counter(f"w{i}_{name}" for i in range(4) for name in "ab")


def test_a_bit_flipped_in_the_bucket(bucket: Any, config: TideConfig) -> None:
    lake = config.state.lake
    write(lake, "acme_1")
    (key,) = [key for key in keys(bucket) if "signals" in key]
    data = bytearray(bucket.get_object(Bucket="lake", Key=key)["Body"].read())
    data[len(data) // 2] ^= 4
    bucket.put_object(Bucket="lake", Key=key, Body=bytes(data))
    assert {f.kind for f in verify_signals(lake / "signals", TARGET, FACTS).findings} >= {"altered"}


def test_a_bucket_that_is_not_there_costs_serving_nothing(bucket: Any, config: TideConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = override(config, {"lake": "s3://nowhere/tide"}).state.lake
    recorder = make_recorder(lake)
    FakeEngine(recorder).run("r")
    assert not recorder.flush()
    assert "NoSuchBucket" in str(recorder.stats()["writer_error"]) or "does not exist" in str(recorder.stats()["writer_error"])
    assert recorder.stats()["queued_windows"] == 1, "kept until the bucket is back"
    bucket.create_bucket(Bucket="nowhere")
    assert recorder.flush() and requests_in(lake) == {"r": 1}
    recorder.close()


def rights_after(endpoint: str, requests: bytes) -> None:
    """moto asks for rights after so many requests."""
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset-auth", requests, {"Content-Type": "text/plain"})).close()


def test_storage_that_denies(bucket: Any, endpoint: str, config: TideConfig) -> None:
    lake = config.state.lake
    write(lake, "acme_1")
    recorder = make_recorder(lake)
    FakeEngine(recorder).run("acme_2")
    rights_after(endpoint, b"0")                           # from here on nobody has one
    try:
        assert not recorder.flush() and "AWS Error" in str(recorder.stats()["writer_error"])
        with pytest.raises(LakeError, match=r"can't list s3://lake/tide/signals.*check that it is there and readable"):
            live_shards(lake / "signals", TARGET)
        with pytest.raises((LakeError, OSError)):
            delete(lake, request_id="acme_1", settle_s=0.0)
    finally:
        rights_after(endpoint, b"inf")
    recorder.close()
    assert requests_in(lake) == Counter(["acme_1", "acme_2"]), "nothing was lost"


def test_storage_that_does_not_answer(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "S3_TIMEOUT_S", (0.2, 0.2))
    monkeypatch.setattr(store_module, "S3_ATTEMPTS", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{silent.getsockname()[1]}")
        recorder = make_recorder("s3://lake/tide", CaptureSettings(mode="off", flush_s=3600.0))  # type: ignore[arg-type]
        FakeEngine(recorder).run("r")
        assert not recorder.flush(30.0) and "OSError" in str(recorder.stats()["writer_error"])
        with pytest.raises(LakeError, match="can't list"):
            live_shards("s3://lake/tide/signals", TARGET)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", bucket.meta.endpoint_url)
    recorder.close()
    assert recorder.stats()["queued_acceptance_rows"] == recorder.stats()["dropped_acceptance_rows"] == 0


@pytest.fixture
def own_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[server.ThreadedMotoServer]:
    """A server that a test may stop and start again on its port, and a client that gives up after a second."""
    monkeypatch.setattr(store_module, "S3_TIMEOUT_S", (1.0, 1.0))
    monkeypatch.setattr(store_module, "S3_ATTEMPTS", 1)
    moto = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    for name, value in (("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}"), ("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test")):
        monkeypatch.setenv(name, value)
    boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1").create_bucket(Bucket="of-its-own")
    yield moto
    moto.stop()


def test_shards_of_a_bucket_that_went_away_are_not_taken_for_damaged(own_server: server.ThreadedMotoServer, config: TideConfig) -> None:
    config = override(config, {"lake": "s3://of-its-own/tide"})
    lake, part = config.state.lake, Part()
    write(lake, "acme_1")
    (logged,), (shard,) = live_shards(lake / "acceptance", TARGET), live_shards(lake / "signals", TARGET)
    windows = list_windows(lake / "signals", TARGET).windows
    looks = [lambda: live_shards(lake / "signals", TARGET), lambda: list_windows(lake / "signals", TARGET),
             lambda: read_tombstones(lake / "signals"), lambda: list(read_states(windows)),
             lambda: readable_shards(lake / "acceptance", TARGET, ACCEPTANCE_SCHEMA, part),
             lambda: list(read_or_fail(WindowReader([lake / "signals"], TARGET), windows)),
             lambda: find_damage(lake / "acceptance", TARGET, part), lambda: read(config, "select count(*) from acceptance", {})]
    _, port = own_server.get_host_and_port()
    own_server.stop()
    for look in looks:
        with pytest.raises(LakeAway, match="s3://of-its-own/tide/"):
            look()
    for one in (logged, shard):
        with pytest.raises(OSError, match="AWS Error") as raised:
            _damage(one)
        assert is_away(raised.value) and isinstance(away(one, raised.value), LakeAway)
    own_server._port = int(port)
    own_server.start()
    for look in looks:
        look()
    assert not _damage(logged) and windows_in(shard, TARGET) == tuple(windows) and requests_in(lake) == {"acme_1": 1}
    assert readable_shards(lake / "acceptance", TARGET, ACCEPTANCE_SCHEMA, part) == ([logged], [])


def test_what_is_damaged_or_denied_is_not_away() -> None:
    assert not is_away(OSError("Couldn't deserialize thrift: TProtocolException: Invalid data"))
    assert not is_away(OSError(5, "Input/output error")) and not is_away(PermissionError(13, "Permission denied"))
    assert not is_away(OSError("When reading information for key 'k' in bucket 'b': AWS Error ACCESS_DENIED during HeadObject operation"))
    for denied in (PermissionError(13, "Permission denied"), OSError("in 'b': AWS Error ACCESS_DENIED during ListObjectsV2 operation"),
                   OSError("in 'b': AWS Error UNKNOWN (HTTP status 403) during ListObjectsV2 operation")):
        assert type(unlisted("s3://b", denied)) is LakeError, "no waiting brings rights"
    assert type(unlisted("s3://b", OSError("in bucket 'b': AWS Error NETWORK_CONNECTION during ListObjectsV2 operation"))) is LakeAway
    assert is_away(OSError(116, "Stale file handle")) and is_away(TimeoutError(110, "Connection timed out"))
    assert is_away(OSError("When reading 'k' in bucket 'b': AWS Error UNKNOWN (HTTP status 503) during GetObject operation"))


@pytest.mark.parametrize("ask", [live_shards, list_windows])
def test_a_folder_that_can_not_be_listed(tmp_path: Path, ask: Any) -> None:
    (tmp_path / "signals").write_text("not a folder")
    with pytest.raises(LakeAway, match=r"can't list .*signals"):
        ask(tmp_path / "signals", TARGET)


def test_a_lake_in_another_folder(tmp_path: Path) -> None:
    config = override(TideConfig(), {"engine": TARGET, "lake": str(tmp_path / "big disk")})
    write(config.state.lake, "acme_1")
    assert requests_in(config.state.lake) == {"acme_1": 1} and (tmp_path / "big disk" / "signals").is_dir()


@pytest.mark.parametrize("root", ["gs://bucket/lake", "s3:///prefix"])
def test_other_addresses_are_refused(root: str) -> None:
    with pytest.raises(LakeError, match="a folder or s3://bucket/prefix"):
        open_store(root)


def test_an_upload_of_several_parts(bucket: Any) -> None:
    store, data = open_store("s3://lake/tide"), random.Random(0).randbytes(12 * 2**20)
    put = store.put_bytes("large-{crc:08x}", data)
    assert store.read_bytes(put.key) == data and put.key == f"large-{zlib.crc32(data):08x}" and len(keys(bucket)) == 1
    assert bucket.list_multipart_uploads(Bucket="lake").get("Uploads", []) == []


def test_a_shard_too_big_for_an_object(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MAX_OBJECT", 10)
    with pytest.raises(LakeError, match=r"lower capture\.shard_rows"):
        open_store("s3://lake/tide").put_bytes("x", b"12345678901")
    assert keys(bucket) == []
