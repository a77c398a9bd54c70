"""How things in a lake are called, and what their names tell. Pure: opens nothing.

<dataset root>/target=<t>/date=YYYY-MM-DD/hour=HH/<replica>-<time_ns>-<uuid8>.parquet            (UTC, the time of writing)
                                                  <who>-<time_ns>-<uuid8>.compact.parquet        made of other shards of its folder
                          _deleted/               tombstones       (readers of Parquet folders pass over what begins with `_`)
                          _maintenance/           claims of whoever rewrites shards
"""

from __future__ import annotations

import re
import time
import uuid
from datetime import UTC, datetime, timedelta
from typing import Protocol
from urllib.parse import quote, unquote

SUPERSEDES_KEY = b"tide.supersedes"        # footer: JSON list of file names in the same folder
TARGET_KEY = b"tide.target"
COMPACT_SUFFIX = ".compact.parquet"
DELETED, MAINTENANCE = "_deleted", "_maintenance"

_NAME = re.compile(r"-(\d{19})-[0-9a-f]{8}(?:\.compact)?\.parquet$")


class Named(Protocol):
    @property
    def name(self) -> str: ...


def new_shard(target: str, replica: str) -> str:
    """A fresh key, relative to the dataset's root, for a shard written now."""
    now_ns = time.time_ns()
    moment = datetime.fromtimestamp(now_ns / 1e9, UTC)
    return f"{target_folder(target)}/date={moment:%Y-%m-%d}/hour={moment:%H}/{_file_name(replica, now_ns)}.parquet"


def successor(folder: str, newest: float) -> str:
    """A fresh key in `folder` for a shard made of others, of which the newest was written at `newest` (Unix seconds).

    It takes over their time, not its own: what a name says of its rows stays as sharp as it was.
    """
    at_ns = round(newest * 1e9) if newest != float("inf") else time.time_ns()
    return f"{folder}/{_file_name('compact', at_ns)}{COMPACT_SUFFIX}"


def _file_name(who: str, at_ns: int) -> str:
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', who) or 'replica'}-{at_ns:019d}-{uuid.uuid4().hex[:8]}"


def target_folder(target: str) -> str:
    return f"target={quote(target, safe='')}"


def target_of(folder: str) -> str:
    return unquote(folder.removeprefix("target="))


def is_compact(name: str) -> bool:
    return name.endswith(COMPACT_SUFFIX)


def written_at(shard: Named) -> float:
    """Unix seconds in a shard's name: no row in it was closed later. Infinity for a name of another make."""
    found = _NAME.search(shard.name)
    return int(found[1]) / 1e9 if found else float("inf")


def hour_end(folder: str) -> float:
    """Unix seconds at which the partition `.../date=D/hour=H` is over (`.../date=D`: the day); infinity for another name."""
    parts = [part.removeprefix("date=").removeprefix("hour=") for part in folder.split("/") if part.startswith(("date=", "hour="))]
    try:
        begin = datetime.strptime(" ".join(parts), "%Y-%m-%d %H" if len(parts) == 2 else "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        return float("inf")
    return (begin + timedelta(hours=1 if len(parts) == 2 else 24)).timestamp()
