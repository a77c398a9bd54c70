"""Where shards lie, what they are called and which of them count. Knows names and footers; knows no columns.

<dataset root>/target=<t>/date=YYYY-MM-DD/hour=HH/<replica>-<time_ns>-<uuid8>.parquet            (UTC, the time of writing)
                                                  <replica>-<time_ns>-<uuid8>.compact.parquet    a compacted shard
A shard is written under a dot-name that ends in `.tmp`, then renamed. A compacted shard lies in the partition of what it replaces
and names that in its footer (`tide.supersedes`); only footers of `.compact.parquet` files are opened to list a lake.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.parquet as pq

from tide_pipeline.errors import LakeError

SUPERSEDES_KEY = b"tide.supersedes"        # JSON list of file names
TARGET_KEY = b"tide.target"
COMPACT_SUFFIX = ".compact.parquet"

_MAGIC = b"PAR1"
_NAME = re.compile(r"-(\d{19})-[0-9a-f]{8}(?:\.compact)?\.parquet$")


def new_shard(root: Path, target: str, replica: str, *, compact: bool = False) -> Path:
    """A fresh path for a shard written now. Creates nothing."""
    now_ns = time.time_ns()
    moment = datetime.fromtimestamp(now_ns / 1e9, UTC)
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", replica) or "replica"
    name = f"{safe}-{now_ns:019d}-{uuid.uuid4().hex[:8]}{COMPACT_SUFFIX if compact else '.parquet'}"
    return target_dir(root, target) / f"date={moment:%Y-%m-%d}" / f"hour={moment:%H}" / name


def target_dir(root: Path, target: str) -> Path:
    return root / f"target={quote(target, safe='')}"


def written_at(path: Path) -> float:
    """Unix seconds in a shard's name: no row in it was closed later. Infinity for a name of another make."""
    found = _NAME.search(path.name)
    return int(found[1]) / 1e9 if found else float("inf")


def live_shards(root: Path, target: str, since: float | None = None) -> list[Path]:
    """Complete shards of `root` (StatePaths.acceptance or .signals) that count, oldest first; [] where there are none.

    With `since` (Unix seconds), those that can hold rows closed at or after it. Raises LakeError when the lake can't be listed.
    """
    return scan(root, target, since)[0]


def scan(root: Path, target: str, since: float | None = None) -> tuple[list[Path], list[tuple[Path, str]]]:
    """`live_shards`, and beside them the files that are no complete Parquet, each with its reason."""
    live: list[Path] = []
    skipped: list[tuple[Path, str]] = []
    superseded: set[str] = set()
    for path in _candidates(root, target, since):
        try:
            reason = _why_incomplete(path)
            if not reason and path.name.endswith(COMPACT_SUFFIX):
                superseded |= _supersedes(path)
        except FileNotFoundError:          # compacted or deleted since the directory was listed
            continue
        except (OSError, ValueError, pa.ArrowException) as error:
            reason = f"unreadable: {error}"
        if reason:
            skipped.append((path, reason))
        else:
            live.append(path)
    live = [path for path in live if path.name not in superseded]     # tombstones (deletion) will be honoured here, and only here
    return sorted(live, key=lambda path: (written_at(path), path.name)), skipped


def targets(root: Path) -> list[str]:
    """Targets that have a folder in this dataset."""
    return sorted(unquote(path.name.removeprefix("target=")) for path in root.glob("target=*"))


def _candidates(root: Path, target: str, since: float | None) -> Iterator[Path]:
    try:
        for hour_dir in sorted(target_dir(root, target).glob("date=*/hour=*")):
            if since is not None and _hour_end(hour_dir) <= since:
                continue
            for path in sorted(hour_dir.glob("*.parquet")):
                if not path.name.startswith(".") and (since is None or written_at(path) >= since):
                    yield path
    except OSError as error:
        raise LakeError(f"can't list {root}: {error}; check that the state directory is readable by this user") from error


def _hour_end(hour_dir: Path) -> float:
    """Unix seconds at which a partition's hour is over; infinity for a folder of another make."""
    text = f"{hour_dir.parent.name.removeprefix('date=')} {hour_dir.name.removeprefix('hour=')}"
    try:
        begin = datetime.strptime(text, "%Y-%m-%d %H").replace(tzinfo=UTC)
    except ValueError:
        return float("inf")
    return (begin + timedelta(hours=1)).timestamp()


def _why_incomplete(path: Path) -> str:
    with path.open("rb") as handle:
        head = handle.read(4)
        size = handle.seek(0, 2)
        handle.seek(max(0, size - 4))
        tail = handle.read(4)
    return "" if size >= 12 and head == tail == _MAGIC else f"not a complete Parquet file ({size} bytes): truncated, or of another kind"


def _supersedes(path: Path) -> set[str]:
    names = json.loads((pq.read_metadata(path).metadata or {}).get(SUPERSEDES_KEY, b"[]"))
    return set(names)
