"""Put a file onto a local disk: complete or absent, mode 0600, folders 0700. Knows whole files; knows no Parquet and no lake.

It is written and synced beside its place and renamed. pyarrow writes it, without Python's lock; the disk is told to begin with each part
as soon as it is written, so that the sync at the end has little left to wait for.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyarrow import fs

from tide_pipeline.capture.checksums import Span, file_crc
from tide_pipeline.capture.names import sealed

SMALL_WRITES = 1 << 18                     # bytes of them that go to the disk together
_PART = 1 << 20                            # bytes that are worth waking the disk for
_SYNC_FILE_RANGE_WRITE = 2


@dataclass
class Sink:
    """What a file is written through."""

    stream: Any                            # of pyarrow
    pages: list[Span] = field(default_factory=list)        # for the writer to add: spans that hold plain Parquet pages with their CRCs

    def part_done(self) -> None:
        """A part is written. Costs little; says nothing of whether it is on the disk."""


@dataclass
class _LocalSink(Sink):
    handle: int = -1
    _begun: int = 0                        # bytes that the disk was told to begin with

    def part_done(self) -> None:
        size = self.stream.tell() - self._begun
        if size >= _PART:
            self.stream.flush()
            _begin_writing(self.handle, self._begun, size)
            self._begun += size


Fill = Callable[[Sink], object]


def put_local(base: Path, key: str, fill: Fill) -> tuple[str, int]:
    """Key and size of a new file under `base`, named `names.sealed(key, its CRC)`."""
    folder = (base / key).parent
    _make_folders(base, folder)
    temporary = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            with _files().open_output_stream(str(temporary), buffer_size=SMALL_WRITES) as stream:
                sink = _LocalSink(stream, handle=handle)
                fill(sink)
            size = os.fstat(handle).st_size
            crc = file_crc(lambda at, count: os.pread(handle, count, at), size, sink.pages)
            os.fsync(handle)
        finally:
            os.close(handle)
        place = sealed(key, crc)
        os.replace(temporary, base / place)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(folder)
    return place, size


def is_leftover(name: str) -> bool:
    """Whether a file is what a crash left of `put_local`."""
    return re.fullmatch(r"\..*\.tmp", name) is not None


@functools.cache
def _files() -> Any:
    return fs.LocalFileSystem()


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Linux's call; None elsewhere."""
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call


def _begin_writing(handle: int, at: int, size: int) -> None:
    """Only a hint: what goes wrong here, fsync will tell."""
    call = _sync_file_range()
    if call is not None:
        call(handle, at, size, _SYNC_FILE_RANGE_WRITE)


def _make_folders(base: Path, folder: Path) -> None:
    """`base` and what lies between it and `folder`, for this user alone."""
    if folder.is_dir():
        return
    base.parent.mkdir(parents=True, exist_ok=True)
    for path in (base, *reversed([p for p in (folder, *folder.parents) if base in p.parents])):
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
            _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """Make a rename last through a power cut; file systems that can't are left alone."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
