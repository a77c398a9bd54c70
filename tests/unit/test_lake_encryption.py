"""Encrypted signals: nothing readable without the key, everything with it, and which other readers can open them."""

from __future__ import annotations

import os
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from tests.fakes_capture import ENGINE, HIDDEN, TAPS, TARGET, FakeEngine, make_recorder
from tests.fakes_drift import config_in
from tests.lake_children import requests_in
from tide_pipeline.capture.compact import compact
from tide_pipeline.capture.delete import delete
from tide_pipeline.capture.encryption import KEY_FILE
from tide_pipeline.capture.layout import live_shards
from tide_pipeline.capture.reader import list_windows
from tide_pipeline.capture.verify import EngineFacts, verify_signals
from tide_pipeline.drift.views import query
from tide_pipeline.errors import SettingsError


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "key"
    file.write_text(os.urandom(32).hex() + "\n")
    file.chmod(0o600)
    monkeypatch.setenv(KEY_FILE, str(file))
    return file


def write(lake: Path, name: str) -> None:
    recorder = make_recorder(lake)
    FakeEngine(recorder).run(name, tenant="secret_tenant")
    recorder.close()
    assert recorder.stats()["writer_error"] == ""


def test_the_whole_life_of_encrypted_signals(tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tide_pipeline.capture.compact.MIN_SHARDS", 2)
    config = config_in(tmp_path)
    lake = config.state.lake
    with monkeypatch.context() as before:
        before.delenv(KEY_FILE)
        write(lake, "plain_request")
    write(lake, "secret_request")
    secret = Path(live_shards(lake / "signals", TARGET)[-1])
    assert b"secret" not in secret.read_bytes() and b"secret" in b"".join(p.read_bytes() for p in (lake / "acceptance").rglob("*.parquet"))
    assert requests_in(lake) == {"plain_request": 1, "secret_request": 1}
    assert verify_signals(lake / "signals", TARGET, EngineFacts(ENGINE, HIDDEN, TAPS)).is_sound
    assert query(config, "select request_id, num_rows from signals order by 1")[1] == [("plain_request", 13), ("secret_request", 13)]
    compact(lake, grace_s=0.0)
    write(lake, "another_request")
    delete(lake, request_id="plain_request", settle_s=0.0)
    assert requests_in(lake) == {"secret_request": 1, "another_request": 1}
    assert not [p for p in (lake / "signals").rglob("*.parquet") if b"_request" in p.read_bytes()], "all is encrypted by now"


def test_without_the_key_or_with_another(tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "lake", "r")
    key.write_text(os.urandom(32).hex())
    index = list_windows(tmp_path / "lake" / "signals", TARGET)
    assert index.windows == [] and len(index.skipped) == 1
    monkeypatch.delenv(KEY_FILE)
    assert list_windows(tmp_path / "lake" / "signals", TARGET).windows == []


def test_other_readers(tmp_path: Path, key: Path) -> None:
    """The table of docs/signals.md."""
    write(tmp_path / "lake", "r")
    (shard,) = live_shards(tmp_path / "lake" / "signals", TARGET)
    assert pq.ParquetFile(shard).metadata.num_rows == 1, "the footer is no secret"
    with pytest.raises(OSError, match=r"(?i)decrypt|encrypt"):
        pq.ParquetFile(shard).read()
    with duckdb.connect() as db, pytest.raises(duckdb.Error):
        db.execute("select request_id from read_parquet(?)", [str(shard)]).fetchall()


@pytest.mark.parametrize(("text", "mode"), [("abc", 0o600), ("00" * 16, 0o600), ("00" * 32, 0o644)])
def test_keys_that_are_none(tmp_path: Path, key: Path, text: str, mode: int) -> None:
    write(tmp_path / "lake", "r")
    key.write_text(text)
    key.chmod(mode)
    with pytest.raises(SettingsError, match="64 hex digits"):
        list_windows(tmp_path / "lake" / "signals", TARGET)
