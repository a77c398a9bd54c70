"""Remove what was captured of a request or of a tenant, from every shard. Knows tombstones; knows no columns and no drafts.

First a tombstone, then new shards without the rows, then the old bytes go: whoever dies on the way leaves a lake that reads right, and
the next run, of `delete` or of any maintenance, goes on. A row that a writer still held is hidden by the tombstone when it arrives and
removed by the next maintenance.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

from tide_pipeline.capture.layout import survey, targets
from tide_pipeline.capture.lease import maintenance
from tide_pipeline.capture.shard import Origin
from tide_pipeline.capture.store import Root, Store, open_store
from tide_pipeline.capture.sweep import DATASETS, SETTLE_S, SIGNALS, Swept, find, sweep
from tide_pipeline.capture.tombstones import LATE_S, Tombstones, hashed, put_tombstone, remember, windows_of


@dataclass
class Deletion(Swept):
    """What one call did, and what was ever found of this request or tenant."""

    windows: set[Origin] = field(default_factory=set)          # by where they stood (shard, row); earlier calls included

    @property
    def is_complete(self) -> bool:
        return not self.unreadable


def delete(lake: Root, *, request_id: str | None = None, tenant: str | None = None, settle_s: float = SETTLE_S) -> Deletion:
    """Delete one request, or all that a tenant has stored until now, of every target.

    A tenant that goes on sending requests is captured again after an hour, unless capture.opted_out_tenants names it.

    Raises:
        LakeError: the lake can't be listed, or somebody else keeps rewriting it.
        OSError: disk or bucket refuse: nothing is half-done, call again.
    """
    assert (request_id is None) != (tenant is None), "either a request or a tenant"
    done, now = Deletion(), time.time()
    for dataset in DATASETS:
        store = open_store(f"{os.fspath(lake)}/{dataset.name}")
        key = put_tombstone(store, request_id=request_id, tenant=tenant, now=now)
        with maintenance(store) as lease:
            if dataset is SIGNALS:
                _remember(store, key, request_id, tenant)
            sweep(lease, store, dataset, done, settle_s)
        if dataset is SIGNALS:
            done.windows = windows_of(store, request_id=request_id, tenant=tenant)
    return done


def _remember(store: Store, key: str, request_id: str | None, tenant: str | None) -> None:
    """Note in the tombstone which windows are about to go."""
    mine = Tombstones(frozenset() if request_id is None else frozenset({hashed(request_id)}),
                      {} if tenant is None else {hashed(tenant): time.time() + LATE_S})
    found = [origin for target in targets(store.root) for rows in find(survey(store.root, target).live, SIGNALS, mine, []).values()
             for origin in rows.gone]
    if found:
        remember(store, key, found, time.time())
