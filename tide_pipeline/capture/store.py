"""A folder of files on local disk or in an S3 bucket, through pyarrow.fs. Knows whole files; knows no Parquet.

A file is complete or absent: on a local disk see sink.py. For a bucket it is finished in memory and sent under its final name: one PUT up
to 5 MiB, above that one multipart upload, which S3 shows when it is complete.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from tide_pipeline.capture.checksums import file_crc
from tide_pipeline.capture.names import sealed
from tide_pipeline.capture.sink import Fill, Sink, put_local
from tide_pipeline.errors import LakeAway, LakeError

Root = str | os.PathLike[str]              # a folder, or s3://bucket/prefix

MAX_OBJECT = 64 * 2**20                    # bytes of one object in a bucket
ONE_PUT = 5 * 2**20                        # above it pyarrow makes an upload of several parts
S3_TIMEOUT_S = (5.0, 30.0)                 # to connect, and for a request
S3_ATTEMPTS = 3

# What is wrong with the storage and not with one file. EIO is not among them: a bad sector gives it too.
_AWAY = {errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
         errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ESHUTDOWN, errno.ENODEV, errno.ENXIO, errno.EREMOTEIO}
_BUCKET_AWAY = re.compile(r"AWS Error (NETWORK_CONNECTION|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|SLOW_DOWN|THROTTLING|REQUEST_TIMEOUT|"
                          r"\w+ \(HTTP status (5\d\d|429)\))")
_BUCKET_DENIES = re.compile(r"AWS Error (ACCESS_DENIED|INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN_ID|SIGNATURE_DOES_NOT_MATCH|"
                            r"\w+ \(HTTP status 40[13]\))")


@dataclass(frozen=True)
class Stored:
    """A file as it was listed. Files of a lake never change, so this names their bytes."""

    store: Store
    key: str                               # relative to the store's root, with slashes
    size: int
    mtime_ns: int

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def folder(self) -> str:
        return self.key.rpartition("/")[0]

    @property
    def uri(self) -> str:
        """A local path, or s3://bucket/key: `open_uri` opens it again."""
        return self.store.uri(self.key)

    def __str__(self) -> str:
        return self.uri

    def __fspath__(self) -> str:
        if not self.store.is_local:
            raise LakeError(f"{self.uri} is no local file: open it through its store")
        return self.uri

    def open(self) -> Any:
        """A random-access file for pyarrow. Raises FileNotFoundError when it was removed since it was listed."""
        return self.store.open(self.key)


@dataclass(frozen=True)
class Store:
    """The folder `root`. Two of the same root are equal."""

    root: str
    base: str = field(compare=False)       # of the root inside `fs`
    fs: Any = field(compare=False, repr=False)
    is_local: bool = field(compare=False)

    def uri(self, key: str) -> str:
        return f"{self.root}/{key}"

    def files(self, folder: str = "", *, recursive: bool = False) -> list[Stored]:
        """Files in `folder`, sorted by key; [] where there is none. Raises OSError."""
        if self.is_local:
            found = [Stored(self, self._key(entry.path), status.st_size, status.st_mtime_ns)
                     for entry in _entries(self._path(folder), recursive) if (status := _stat(entry))]
            return sorted(found, key=lambda file: file.key)
        infos = [info for info in self._infos(folder, recursive) if info.type == fs.FileType.File]
        return sorted((Stored(self, self._key(info.path), info.size or 0, info.mtime_ns or 0) for info in infos), key=lambda f: f.key)

    def keys(self, folder: str = "", *, recursive: bool = False) -> list[str]:
        """Keys of `files`, in any order; cheaper on a local disk."""
        if self.is_local:
            return [self._key(entry.path) for entry in _entries(self._path(folder), recursive)]
        return [file.key for file in self.files(folder, recursive=recursive)]

    def folders(self, folder: str = "") -> list[str]:
        """Keys of the folders directly in `folder`, sorted."""
        return sorted(self._key(info.path).rstrip("/") for info in self._infos(folder, False) if info.type == fs.FileType.Directory)

    def open(self, key: str) -> Any:
        return self.fs.open_input_file(self._path(key))

    def put(self, key: str, fill: Fill) -> Stored:
        """A new file with what `fill` writes into the sink it is given, named `names.sealed(key, its CRC)`. A failure leaves nothing.

        Raises OSError when disk or bucket refuse, LakeError for an object above MAX_OBJECT.
        """
        if self.is_local:
            return Stored(self, *put_local(Path(self.base), key, fill), 0)
        sink = Sink(pa.BufferOutputStream())
        fill(sink)
        data = sink.stream.getvalue()
        bytes_ = memoryview(data)
        place = sealed(key, file_crc(lambda at, count: bytes_[at:at + count], data.size, sink.pages))
        self._put_object(place, data)
        return Stored(self, place, data.size, 0)

    def put_bytes(self, key: str, data: bytes) -> Stored:
        return self.put(key, lambda sink: sink.stream.write(data))

    def read_bytes(self, key: str) -> bytes:
        with self.open(key) as stream:
            return bytes(stream.read())

    def remove(self, key: str) -> None:
        """Remove a file; one that is gone already is no error."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_file(self._path(key))

    def prune(self, folder: str) -> None:
        """Remove a local folder that is empty, and the day above it; a bucket has no folders."""
        if self.is_local:
            with contextlib.suppress(OSError):
                os.rmdir(self._path(folder))
                os.rmdir(self._path(folder.rpartition("/")[0]))

    def _put_object(self, key: str, data: Any) -> None:
        if data.size > MAX_OBJECT:
            raise LakeError(f"a shard of {data.size} bytes is too big for a bucket (at most {MAX_OBJECT}): lower capture.shard_rows")
        try:
            with self.fs.open_output_stream(self._path(key)) as stream:
                stream.write(data)
        except BaseException:
            if data.size > ONE_PUT:            # pyarrow completes a multipart upload that failed half-way when it closes the stream
                with contextlib.suppress(OSError):
                    self.remove(key)
            raise

    def _infos(self, folder: str, recursive: bool) -> list[Any]:
        found: list[Any] = self.fs.get_file_info(fs.FileSelector(self._path(folder), recursive=recursive, allow_not_found=True))
        return found

    def _path(self, key: str) -> str:
        return f"{self.base}/{key}".rstrip("/")

    def _key(self, path: str) -> str:
        return path[len(self.base) + 1:]


def open_store(root: Root) -> Store:
    """The store at a local folder (which need not exist) or s3://bucket/prefix. Connects to nothing yet.

    A bucket's credentials, region and endpoint are those of the environment: AWS_ACCESS_KEY_ID and so on, AWS_REGION, and
    AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL for S3-compatible storage.
    """
    text = os.fspath(root).rstrip("/") or "/"
    scheme, separator, rest = text.partition("://")
    if not separator:
        path = str(Path(text).absolute())
        return Store(path, path, _local(), True)
    if scheme != "s3" or not rest.partition("/")[0]:
        raise LakeError(f"a lake is a folder or s3://bucket/prefix, not {text!r}")
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY",
             "AWS_SESSION_TOKEN")
    return Store(text, rest, _bucket(tuple((name, os.environ.get(name, "")) for name in names)), False)


def open_uri(uri: str) -> Any:
    """The file that `Stored.uri` named."""
    folder, _, name = uri.rpartition("/")
    return open_store(folder).open(name)


def is_away(error: BaseException) -> bool:
    """Whether reading one file failed because its storage did not answer. What is damaged or denied is not away."""
    return (isinstance(error, OSError) and error.errno in _AWAY) or _BUCKET_AWAY.search(str(error)) is not None


def unlisted(root: object, error: OSError) -> LakeError:
    """What to raise where a lake can't be listed: LakeAway, but for missing rights, which no waiting brings."""
    is_denied = isinstance(error, PermissionError) or _BUCKET_DENIES.search(str(error)) is not None
    return (LakeError if is_denied else LakeAway)(f"can't list {root}: {error}; check that it is there and readable by this user")


def away(file: object, error: BaseException) -> LakeAway:
    """What to raise then."""
    return LakeAway(f"can't read {file} now: {error}; see whether its storage runs and can be reached from this host")


@functools.cache
def _local() -> Any:
    return fs.LocalFileSystem()


@functools.lru_cache(maxsize=8)
def _bucket(environment: tuple[tuple[str, str], ...]) -> Any:
    found: Mapping[str, str] = {name: value for name, value in environment if value}
    endpoint = found.get("AWS_ENDPOINT_URL_S3") or found.get("AWS_ENDPOINT_URL") or ""
    scheme, _, host = endpoint.rpartition("://")
    more = {"endpoint_override": host, "scheme": scheme or "https"} if host else {}
    region = found.get("AWS_REGION") or found.get("AWS_DEFAULT_REGION") or ("us-east-1" if host else None)
    return fs.S3FileSystem(region=region, connect_timeout=S3_TIMEOUT_S[0], request_timeout=S3_TIMEOUT_S[1],
                           retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS),
                           background_writes=False, allow_delayed_open=True, **more)


def _entries(folder: str, recursive: bool) -> Iterator[os.DirEntry[str]]:
    """Files in a local folder. pyarrow's listing asks for each one's status."""
    try:
        with os.scandir(folder) as found:
            for entry in found:
                if entry.is_file():
                    yield entry
                elif recursive and entry.is_dir():
                    yield from _entries(entry.path, recursive)
    except FileNotFoundError:
        return


def _stat(entry: os.DirEntry[str]) -> os.stat_result | None:
    """None for a file that went since it was listed."""
    try:
        return entry.stat()
    except FileNotFoundError:
        return None
