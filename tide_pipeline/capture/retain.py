"""Let go of what is too old or too much. Knows ages, bytes and tenants; knows no reason for any of them.

Whole hours go by age, the oldest shards by bytes, and the rows of a tenant by an age of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from tide_pipeline.capture.compact import GRACE_S, clean
from tide_pipeline.capture.layout import Listing, superseded_by, survey, targets
from tide_pipeline.capture.lease import Lease, maintenance
from tide_pipeline.capture.names import hour_end, written_at
from tide_pipeline.capture.rewrite import remove
from tide_pipeline.capture.store import Root, Store, Stored, open_store
from tide_pipeline.capture.sweep import DATASETS, LEFTOVER_S, SETTLE_S, SIGNALS, Dataset, Swept, sweep, take_out
from tide_pipeline.capture.tombstones import Tombstones, hashed
from tide_pipeline.config import RetentionSettings
from tide_pipeline.errors import SettingsError

DAY_S = 86_400.0


@dataclass(frozen=True)
class Retention:
    """How long what is kept; None and {} are for ever."""

    signals_age_s: float | None = None
    acceptance_age_s: float | None = None
    signals_bytes: int | None = None                               # of all targets together, superseded shards included
    tenant_age_s: Mapping[str, float] = field(default_factory=dict)    # rows of signals go, rows of acceptance become nameless

    @classmethod
    def of(cls, settings: RetentionSettings) -> Retention:
        """What the settings say. Raises SettingsError for a tenant's age that is none."""
        return cls(settings.signal_days * DAY_S or None, settings.acceptance_days * DAY_S or None, int(settings.signal_gb * 1e9) or None,
                   dict(_tenant_age(text) for text in settings.tenant_days))


def _tenant_age(text: str) -> tuple[str, float]:
    name, _, days = text.rpartition("=")
    try:
        return name, float(days) * DAY_S
    except ValueError:
        raise SettingsError(f"age of a tenant {text!r}: expected NAME=DAYS, such as acme=7") from None


@dataclass
class Retained(Swept):
    """What was done, over both datasets."""

    expired_shards: int = 0
    left_bytes: dict[str, int] = field(default_factory=dict)           # by dataset


def retain(lake: Root, keep: Retention, *, grace_s: float = GRACE_S, settle_s: float = SETTLE_S) -> Retained:
    """Carry out `keep` and all tombstones. Raises as `compact` does."""
    done = Retained()
    for dataset in DATASETS:
        store = open_store(f"{os.fspath(lake)}/{dataset.name}")
        with maintenance(store) as lease:
            sweep(lease, store, dataset, done, settle_s)
            take_out(lease, store, dataset, _old_rows(keep), done, settle_s)
            age_s = keep.signals_age_s if dataset is SIGNALS else keep.acceptance_age_s
            for target in targets(store.root):
                listing = survey(store.root, target)
                if age_s is not None:
                    files = (*listing.live, *(file for file, _ in listing.skipped))
                    _expire(lease, listing, [file for file in files if hour_end(file.folder) < time.time() - age_s], done)
                done.removed_files += clean(lease, survey(store.root, target), grace_s)
            done.left_bytes[dataset.name] = _fit(lease, store, dataset, keep, done)
    return done


def _old_rows(keep: Retention) -> Tombstones:
    return Tombstones(tenants={hashed(tenant): time.time() - age_s for tenant, age_s in keep.tenant_age_s.items()})


def _fit(lease: Lease, store: Store, dataset: Dataset, keep: Retention, done: Retained) -> int:
    """Remove the oldest shards until the rest fits; the bytes that are left."""
    listings = {target: survey(store.root, target) for target in targets(store.root)}
    left = sum(file.size for listing in listings.values() for file in (*listing.live, *listing.superseded))
    if dataset is not SIGNALS or keep.signals_bytes is None:
        return left
    oldest_first = sorted(((shard, listing) for listing in listings.values() for shard in listing.live),
                          key=lambda entry: (hour_end(entry[0].folder), written_at(entry[0])))
    for shard, listing in oldest_first:
        if left <= keep.signals_bytes:
            break
        names = superseded_by(shard)
        left -= shard.size + sum(file.size for file in listing.superseded if file.folder == shard.folder and file.name in names)
        _expire(lease, listing, [shard], done)
    return left


def _expire(lease: Lease, listing: Listing, shards: list[Stored], done: Retained) -> None:
    done.expired_shards += len(shards)
    done.removed_files += remove(lease, listing, shards)
    for shard in shards:
        if hour_end(shard.folder) < time.time() - LEFTOVER_S:      # no writer adds to that hour any more
            shard.store.prune(shard.folder)
