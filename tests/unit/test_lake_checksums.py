"""One pass instead of three: the name's CRC-32 is the file's, digests see every change, and lakes from before are read as they were."""

from __future__ import annotations

import hashlib
import random
import shutil
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.fakes_capture import ENGINE, HIDDEN, TAPS, TARGET, FakeEngine, make_recorder, states_of
from tide_pipeline.capture import checksums
from tide_pipeline.capture.checksums import Span, file_crc, joined
from tide_pipeline.capture.compact import compact
from tide_pipeline.capture.digests import bytes_digest, window_digest
from tide_pipeline.capture.layout import live_shards
from tide_pipeline.capture.names import checksum
from tide_pipeline.capture.reader import list_windows, read_states
from tide_pipeline.capture.shard import _plain_pages
from tide_pipeline.capture.verify import EngineFacts, verify_signals

FACTS = EngineFacts(ENGINE, HIDDEN, TAPS)
OLD = Path(__file__).parents[1] / "golden" / "lake_v1"     # written by the code of version 1: requests `first` and `second`


def crc_of(data: bytes, pages: list[Span]) -> int:
    return file_crc(lambda at, size: data[at:at + min(size, 7001)], len(data), pages)


@pytest.mark.parametrize("sizes", [(0, 0), (5, 0), (0, 9), (1, 1), (1000, 70_001)])
def test_two_checksums_make_that_of_both(sizes: tuple[int, int]) -> None:
    first, second = (random.Random(size).randbytes(size) for size in sizes)
    assert joined(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


def test_pages_are_not_passed_over_and_the_sum_is_that_of_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tide_pipeline.capture.encode.GROUP_BYTES", 5000)
    recorder = make_recorder(tmp_path)
    engine = FakeEngine(recorder)
    for i in range(4):
        engine.run(f"r{i}", prompt_tokens=20, steps=30)
    recorder.close()
    (shard,) = live_shards(tmp_path / "signals", TARGET)
    data, metadata = Path(shard).read_bytes(), pq.read_metadata(shard)
    pages = list(_plain_pages(metadata))
    assert checksum(shard) == zlib.crc32(data) and len(pages) == 2 * metadata.num_row_groups == 8
    over: list[int] = []

    def counted(piece: bytes, crc: int) -> int:
        over.append(len(piece))
        return zlib.crc32(piece, crc)

    with monkeypatch.context() as patch:
        patch.setattr(checksums, "zlib", SimpleNamespace(crc32=counted))
        assert crc_of(data, pages) == checksum(shard)
    view = memoryview(pa.py_buffer(data))                  # what a bucket's shard is made in: its bytes are signed
    assert file_crc(lambda at, size: view[at:at + size], len(data), pages) == checksum(shard)
    assert sum(over) <= len(data) - 4 * 110 * HIDDEN * (TAPS + 1) * 2, "not a byte of the states"
    assert crc_of(data, [(4, 40)]) == checksum(shard), "a span that holds something else costs time, not truth"
    with pytest.raises(OSError, match="too early"):
        file_crc(lambda at, size: data[at:at + size], len(data) + 1)


def test_a_digest_sees_what_can_happen_to_states() -> None:
    chance = np.random.default_rng(0)
    taps, final, tokens = chance.integers(0, 256, (9, 24), np.uint8), chance.integers(0, 256, (9, 6), np.uint8), list(range(10))
    whole = window_digest(tokens, taps.reshape(-1), final.reshape(-1))
    changed = []
    for _ in range(200):
        one = taps.copy()
        one[chance.integers(9), chance.integers(24)] ^= 1 << chance.integers(8)
        changed.append(one)
    changed += [taps[::-1], np.roll(taps, 8, 1), np.roll(taps, 1, 0), np.where(np.arange(9)[:, None] < 4, taps, 0).astype(np.uint8)]
    last = final.copy()
    last[8, 5] ^= 1
    digests = {whole, window_digest(tokens, taps.reshape(-1), None), window_digest([*tokens[:-1], 0], taps.reshape(-1), final.reshape(-1)),
               window_digest(tokens, taps.reshape(-1), last.reshape(-1))}
    assert len(digests) == 4
    assert whole not in {window_digest(tokens, np.ascontiguousarray(one).reshape(-1), final.reshape(-1)) for one in changed}


def test_a_digest_is_what_the_docs_say() -> None:
    states = np.arange(48, dtype="<u8").reshape(3, 16)
    tokens = np.array([7, 8, 9, 10], "<i4")
    by_hand = hashlib.sha256(tokens.tobytes())
    for cell in (states[:, :12], states[:, 12:]):
        by_hand.update(cell.sum(1).tobytes() + cell.sum(0).tobytes())
    taps, final = (np.ascontiguousarray(cell).view(np.uint8).reshape(-1) for cell in (states[:, :12], states[:, 12:]))
    assert window_digest([7, 8, 9, 10], taps, final) == by_hand.hexdigest()
    assert bytes_digest([7], b"ab", b"c") == hashlib.sha256(b"\7\0\0\0abc").hexdigest()


def test_a_lake_of_version_1_is_read_verified_and_compacted_with_new_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tide_pipeline.capture.compact.MIN_SHARDS", 2)
    monkeypatch.setattr("tide_pipeline.capture.names.time.time_ns", lambda: 1795367999000000000)     # the old shard's hour
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    Path(*live_shards(tmp_path / "signals", TARGET)).chmod(0o600)
    recorder = make_recorder(tmp_path)
    FakeEngine(recorder).run("third")
    recorder.close()
    for _ in range(2):
        windows = list_windows(tmp_path / "signals", TARGET).windows
        read = {s.window.request_id: s for s in read_states(windows, strict=True)}
        assert set(read) == {"first", "second", "third"} and verify_signals(tmp_path / "signals", TARGET, FACTS).findings == []
        assert all((read[name].taps_TG == states_of(name, range(13), HIDDEN * (TAPS + 1))[:, :HIDDEN * TAPS]).all() for name in read)
        compact(tmp_path, grace_s=0.0, settle_s=0.0)
    (shard,) = live_shards(tmp_path / "signals", TARGET)
    assert shard.name.startswith("compact-")
    assert sorted(pq.ParquetFile(shard).read(["schema_version"]).column(0).to_pylist()) == [1, 1, 2]
    data = bytearray(Path(shard).read_bytes())
    needle = states_of("second", [5], HIDDEN * TAPS).view(torch.int16).numpy().tobytes()
    data[data.index(needle)] ^= 1
    Path(shard).write_bytes(data)
    assert {f.kind for f in verify_signals(tmp_path / "signals", TARGET, FACTS).findings} == {"altered", "damaged"}
