"""What a draft's birth certificate says of the windows it was trained on: how many, and where they lie. Knows no draft and no states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tide_pipeline.contracts import SignalWindow
from tide_pipeline.provenance import digest_bytes
from tide_pipeline.training.data import WindowSplit


def of_windows(split: WindowSplit) -> dict[str, Any]:
    """Counts, places, and what was left out; no content."""
    train = split.train
    return {"windows": len(train), "rows": split.num_rows, "requests": len({w.request_id for w in train}),
            "prompts": len({w.prompt_digest for w in train}), "shards": shards(train), "shard_digests": shard_digests(train),
            "skipped": dict(split.skipped)}


def shards(windows: Sequence[SignalWindow]) -> dict[str, list[int]]:
    """Shard uri -> rows of it that were trained on."""
    found: dict[str, list[int]] = {}
    for w in windows:
        found.setdefault(w.uri, []).append(w.row)
    return {uri: sorted(rows) for uri, rows in sorted(found.items())}


def shard_digests(windows: Sequence[SignalWindow]) -> dict[str, str]:
    """Shard uri -> SHA-256 over the digests of the windows of it that were trained on, in row order: one window's own stays in the lake."""
    found: dict[str, list[str]] = {}
    for w in sorted(windows, key=lambda w: w.row):
        found.setdefault(w.uri, []).append(w.digest)
    return {uri: digest_bytes("\n".join(digests).encode()) for uri, digests in sorted(found.items())}
