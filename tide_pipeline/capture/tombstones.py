"""What was deleted, so that rows that arrive late go too. Knows names of files in `_deleted/`; knows no shards.

    _deleted/request-<sha256 of the request id>.json                    every row of that request
    _deleted/tenant-<sha256 of the tenant>-<time_ns>.json               every row of the tenant closed until that time
    _deleted/swept.json                                                 up to when shards have been looked through for all of these

A name tells all that a reader needs: one listing, and no file is opened. Inside stand the windows that were found (shard and row, all
that they ever had), for the report of which drafts were trained on them; nothing tells whose they were.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from tide_pipeline.capture.names import DELETED
from tide_pipeline.capture.shard import Origin
from tide_pipeline.capture.store import Root, Store, open_store, unlisted

LATE_S = 3600.0                    # rows of a tenant that were being made when it was deleted, and clocks that differ

SWEPT = f"{DELETED}/swept.json"

_NAME = re.compile(r"(request|tenant)-([0-9a-f]{64})(?:-(\d{19}))?\.json$")


def hashed(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


@dataclass(frozen=True)
class Tombstones:
    """All of a dataset. False when there are none."""

    requests: frozenset[str] = frozenset()                             # hashes of request ids
    tenants: Mapping[str, float] = field(default_factory=dict)         # hash -> Unix seconds until which closed rows are gone
    name: str = ""                                                     # of exactly these; "" for those that are in no store

    def __bool__(self) -> bool:
        return bool(self.requests or self.tenants)

    def cover(self, request_id: str, tenant: str, closed_at: float) -> bool:
        """Whether a row is deleted."""
        return ((bool(self.requests) and hashed(request_id) in self.requests)
                or (bool(self.tenants) and closed_at <= self.tenants.get(hashed(tenant), float("-inf"))))


def read_tombstones(root: Root) -> Tombstones:
    """Raises LakeAway when the dataset can't be listed."""
    try:
        names = [file.name for file in open_store(root).files(DELETED)]
    except OSError as error:
        raise unlisted(root, error) from error
    names = sorted(name for name in names if _NAME.match(name))
    requests, tenants = set(), dict[str, float]()
    for kind, digest, until_ns in (found.groups() for name in names if (found := _NAME.match(name))):
        if kind == "request":
            requests.add(digest)
        elif until_ns:
            tenants[digest] = max(tenants.get(digest, 0.0), int(until_ns) / 1e9)
    return Tombstones(frozenset(requests), tenants, hashed("\n".join(names)))


def put_tombstone(store: Store, *, request_id: str | None, tenant: str | None, now: float) -> str:
    """Leave a tombstone; its key. From here on no reader gives out a row that it covers."""
    if request_id is not None:
        key = f"{DELETED}/request-{hashed(request_id)}.json"
    else:
        assert tenant is not None
        key = f"{DELETED}/tenant-{hashed(tenant)}-{round((now + LATE_S) * 1e9):019d}.json"
    if not any(file.key == key for file in store.files(DELETED)):
        _put(store, key, [], now)
    return key


def remember(store: Store, key: str, windows: list[Origin], now: float) -> None:
    """Add windows to what a tombstone found."""
    _put(store, key, sorted({*_windows(store, key), *windows}), now)


def windows_of(store: Store, *, request_id: str | None, tenant: str | None) -> set[Origin]:
    """Windows that this deletion, and earlier ones of the same request or tenant, found."""
    begin = f"request-{hashed(request_id)}." if request_id is not None else f"tenant-{hashed(tenant or '')}-"
    return {window for file in store.files(DELETED) if file.name.startswith(begin) for window in _windows(store, file.key)}


def swept_until(store: Store, tombstones: Tombstones) -> float:
    """Unix seconds: shards from before were looked through for all of these already. Minus infinity when there were fewer then."""
    if not any(file.key == SWEPT for file in store.files(DELETED)):
        return float("-inf")
    swept = json.loads(store.read_bytes(SWEPT))
    return float(swept["at"]) - LATE_S if swept["tombstones"] == tombstones.name else float("-inf")


def note_swept(store: Store, tombstones: Tombstones, begun: float) -> None:
    """Every shard that was there at `begun` has been looked through, and nothing covered is left in it."""
    store.put_bytes(SWEPT, json.dumps({"at": begun, "tombstones": tombstones.name}).encode())


def _windows(store: Store, key: str) -> set[Origin]:
    return {tuple((name, row) for name, row in addresses) for addresses in json.loads(store.read_bytes(key))["windows"]}


def _put(store: Store, key: str, windows: list[Origin], now: float) -> None:
    store.put_bytes(key, json.dumps({"at": now, "windows": windows}).encode())
