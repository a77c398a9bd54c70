"""Optional Parquet modular encryption of `signals/`. Knows the key file; knows no columns.

TIDE_LAKE_KEY_FILE names a file of 64 hex digits (AES-256-GCM), for whoever writes or reads a lake; without it nothing is encrypted.
Footers stay readable and are signed, so that shards can be listed, superseded and told apart without the key: schema, row counts and
file names are no secret, every page of every column and its statistics are. Shards from before the key are read as they are.
"""

from __future__ import annotations

import functools
import os
import stat
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tide_pipeline.errors import SettingsError

KEY_FILE = "TIDE_LAKE_KEY_FILE"


def is_on() -> bool:
    return bool(os.environ.get(KEY_FILE))


def for_writing() -> dict[str, Any]:
    """Options of ParquetWriter for a dataset that is private."""
    key = _key()
    if key is None:
        return {}
    return {"encryption_properties": _library().create_encryption_properties(key, plaintext_footer=True)}


def for_reading() -> dict[str, Any]:
    """Options of ParquetFile, read_schema and ParquetFragmentScanOptions, for shards with and without encryption."""
    key = _key()
    if key is None:
        return {}
    return {"decryption_properties": _library().create_decryption_properties(key, allow_plaintext_files=True)}


def parquet_file(stream: Any, **options: Any) -> Any:
    """`pyarrow.parquet.ParquetFile` with the key, where there is one."""
    return pq.ParquetFile(stream, **options, **for_reading())


def _key() -> bytes | None:
    name = os.environ.get(KEY_FILE)
    return _read(name, Path(name).stat().st_mtime_ns if Path(name).exists() else 0) if name else None


@functools.lru_cache(maxsize=8)
def _read(name: str, _: int) -> bytes:
    file = Path(name)
    try:
        mode, text = stat.S_IMODE(file.stat().st_mode), file.read_text().strip()
        key = bytes.fromhex(text)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{KEY_FILE}: can't read a key of 64 hex digits from {name} ({type(error).__name__}): "
                            "make one with `openssl rand -hex 32`, mode 0600") from error
    if len(key) != 32 or mode & 0o077:
        raise SettingsError(f"{KEY_FILE}: {name} must hold 64 hex digits and be readable by its owner alone (chmod 600)")
    return key


def _library() -> Any:
    try:
        from pyarrow.parquet import encryption
    except ImportError as error:
        raise SettingsError(f"{KEY_FILE} is set, but this pyarrow was built without Parquet encryption") from error
    if not hasattr(encryption, "create_encryption_properties"):
        raise SettingsError(f"{KEY_FILE} is set, but this pyarrow is too old for it: install the locked version")
    return encryption
