"""How things in a lake are called, and what their names tell. Pure: opens nothing.

<dataset root>/target=<t>/date=YYYY-MM-DD/hour=HH/<replica>-<time_ns>-c<crc32>.parquet           (UTC, the time of writing)
                                                  compact-<time_ns>-c<crc32>.compact.parquet     made of other shards of its folder
               _deleted/               tombstones       (readers of Parquet folders pass over what begins with `_`)
               _maintenance/           claims of whoever rewrites shards
<crc32> is of the file's bytes; names from before it have eight random digits there and no `c`.
"""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta
from typing import Protocol
from urllib.parse import quote, unquote

SUPERSEDES_KEY = b"tide.supersedes"        # footer: JSON list of file names in the same folder
ORIGINS_KEY = b"tide.origins"              # footer of the same: JSON list of [file name, row there, number of rows, row here]
TARGET_KEY = b"tide.target"
COMPACT_SUFFIX = ".compact.parquet"
DELETED, MAINTENANCE = "_deleted", "_maintenance"

_CRC = "{crc:08x}"                         # until the bytes are known
_NAME = re.compile(r"-(\d{19})-(?:c(?P<crc>[0-9a-f]{8})|[0-9a-f]{8})(?:\.compact)?\.parquet$")


class Named(Protocol):
    @property
    def name(self) -> str: ...


def new_shard(target: str, replica: str) -> str:
    """A fresh key, relative to the dataset's root, for a shard written now; `sealed` gives it its checksum."""
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
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', who) or 'replica'}-{at_ns:019d}-c{_CRC}"


def sealed(key: str, crc: int) -> str:
    """The final key of a file with this CRC-32; a key without a place for it stays as it is."""
    return key.replace(_CRC, f"{crc:08x}")


def checksum(shard: Named) -> int | None:
    """CRC-32 that a shard's bytes should have; None where its name tells none."""
    found = _NAME.search(shard.name)
    return int(found["crc"], 16) if found and found["crc"] else None


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
