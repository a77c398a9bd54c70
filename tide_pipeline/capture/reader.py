"""Find windows in the signal lake and read their states. Knows Parquet and the layout; knows no losses, batches or SQL.

What shards hold is in index.py. A shard that can't be read is skipped and reported.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from tide_pipeline.capture.digests import DIGESTS
from tide_pipeline.capture.encryption import parquet_file
from tide_pipeline.capture.index import is_remembered, windows_in
from tide_pipeline.capture.layout import Listing, Vanished, live_shards, newest_first, settled, survey, targets, written_at
from tide_pipeline.capture.newest import Newest, RowCount
from tide_pipeline.capture.store import Root, Stored, away, is_away, open_uri
from tide_pipeline.capture.tombstones import read_tombstones
from tide_pipeline.contracts import SignalWindow
from tide_pipeline.errors import CorruptShard, NotEnoughSignals

if TYPE_CHECKING:
    from torch import Tensor  # where states are read it is imported: the drift sensor only counts rows, and does not wait for torch

__all__ = ["Identity", "WindowIndex", "WindowStates", "count_rows", "count_rows_each", "find_again", "identity", "list_windows",
           "live_shards", "reached_at", "read_states"]

_log = logging.getLogger(__name__)

Identity = tuple[str, int, int, float, str]
MOST_OPENED = 200                  # shards by one count, at a millisecond each: the next one goes on where it ended
LATE_S = 3_600.0                   # a window lies in the folder of the hour in which it was written, at most so long after it closed

_STATES = ("request_id", "start_pos", "num_rows", "hidden_size", "num_taps", "token_ids", "rejected", "taps", "final", "digest",
           "schema_version")


@dataclass(frozen=True)
class WindowIndex:
    """Windows, newest first, and what could not be read on the way."""

    windows: list[SignalWindow]
    skipped: list[tuple[Stored, str]] = field(default_factory=list)
    other_engines: int = 0                 # windows passed over because another engine made them

    @property
    def num_rows(self) -> int:
        return sum(window.num_rows for window in self.windows)


@dataclass(frozen=True)
class WindowStates:
    """One window in memory. Row t: taps and final state of token_ids[t]; token_ids has one more entry than there are rows."""

    window: SignalWindow
    token_ids: Tensor                      # int64 [T + 1]
    taps_TG: Tensor                        # bf16 [T, num_taps * D]
    final_TD: Tensor | None                # bf16 [T, D]; None when the engine has soft_targets = false
    rejected_R2: Tensor = field(default_factory=lambda: _rejected(None))    # position, rejected draft token

    @property
    def num_rows(self) -> int:
        return len(self.taps_TG)


def identity(window: SignalWindow) -> Identity:
    """What stays of a window wherever maintenance moves its row."""
    return window.request_id, window.start_pos, window.num_rows, window.closed_at, window.digest


def list_windows(signals_root: Root, target: str, *, workloads: Collection[str] | None = None, since: float | None = None,
                 until: float | None = None, engine_digest: str | None = None, max_windows: int | None = None,
                 max_each: int | None = None, among: int | None = None) -> WindowIndex:
    """Windows of `target` that match, closed at `since` or later and before `until`, newest first; [] when none does.

    `max_windows` at most, and of every workload `max_each` at most. `among`: of the newest shards that hold so many windows together;
    older ones are not opened, so that time and memory are bounded whatever the lake holds.

    Raises:
        NotEnoughSignals: the lake holds nothing at all for this target.
        LakeAway: the lake can't be listed or read now.
    """
    def wanted(window: SignalWindow) -> bool:
        return ((workloads is None or window.workload in workloads) and (since is None or window.closed_at >= since)
                and (until is None or window.closed_at < until))

    return settled(lambda: _list_windows(signals_root, target, wanted, since, until, engine_digest, Newest(max_windows, max_each), among))


def find_again(signals_root: Root, target: str, known: Collection[Identity]) -> WindowIndex:
    """Windows by what stays of them, wherever maintenance has put them; of those that no shard holds, nothing. Raises as list_windows."""
    since = min((closed_at for _, _, _, closed_at, _ in known), default=float("inf"))
    return settled(lambda: _list_windows(signals_root, target, lambda window: identity(window) in known, since, None, None, Newest(), None))


def _list_windows(root: Root, target: str, wanted: Callable[[SignalWindow], bool], since: float | None, until: float | None,
                  engine_digest: str | None, found: Newest | RowCount, among: int | None, opens: int | None = None) -> WindowIndex:
    begun_before = None if until is None else until + LATE_S
    # Without a limit every shard is wanted, and one listing of all costs a bucket fewer requests than one of each day.
    listings = (iter([survey(root, target, since, begun_before)]) if not found.is_bounded and among is None
                else newest_first(root, target, since, begun_before))
    tombstones = read_tombstones(root)
    skipped: list[tuple[Stored, str]] = []
    seen: set[tuple[str, int, int, float]] = set()
    other_engines, is_empty = 0, True
    for shard in _to_open(_newest_first(listings, skipped), target, opens):
        is_empty = False
        if found.needs_nothing_before(written_at(shard)) or (among is not None and len(seen) >= among):
            break
        for window in _first_seen(_readable_windows(shard, target, skipped), seen, shard, skipped):
            if (tombstones and tombstones.cover(window.request_id, window.tenant, window.closed_at)) or not wanted(window):
                continue
            if engine_digest is not None and window.engine_digest != engine_digest:
                other_engines += 1
                continue
            found.put(window)
    if is_empty and not skipped and ((since is None and until is None) or _holds_nothing(root, target)):
        others = ", ".join(targets(root))
        raise NotEnoughSignals(f"no signals of target {target!r} under {root}: serve traffic with capture.mode auto or on"
                               + (f", or name one of the targets there: {others}" if others else ""))
    return WindowIndex(found.windows(), skipped, other_engines)


def _newest_first(listings: Iterable[Listing], skipped: list[tuple[Stored, str]]) -> Iterator[Stored]:
    for listing in listings:
        skipped += listing.skipped
        yield from reversed(listing.live)


def _to_open(shards: Iterable[Stored], target: str, opens: int | None) -> Iterator[Stored]:
    """As many as there are before more than `opens` of them would have to be opened; None is no limit."""
    opened = 0
    for shard in shards:
        opened += opens is not None and not is_remembered(shard, target)
        if opens is not None and opened > opens:
            return
        yield shard


def _holds_nothing(root: Root, target: str) -> bool:
    return not any(listing.live or listing.skipped for listing in newest_first(root, target))


def count_rows(signals_root: Root, target: str, *, workloads: Collection[str] | None = None, since: float | None = None,
               until: float | None = None, engine_digest: str | None = None) -> int:
    """Captured token rows that match; 0 for an empty or missing lake. Raises LakeError when it can't be listed."""
    try:
        return list_windows(signals_root, target, workloads=workloads, since=since, until=until, engine_digest=engine_digest).num_rows
    except NotEnoughSignals:
        return 0


def count_rows_each(signals_root: Root, target: str, since: Mapping[str, float], *, enough: int, among: int) -> dict[str, int]:
    """Captured token rows of every workload in `since`, closed at that time or later, from the newest on; for who asks again and again.

    Shards are opened until each workload has `enough` rows (more are not counted), or until they held `among` windows of all workloads
    together. A call opens no more than MOST_OPENED that no call before it has read: after a start, older rows come with the next calls.
    Raises LakeError when the lake can't be listed.
    """
    def counted() -> dict[str, int]:
        found = RowCount(since, enough)
        _list_windows(signals_root, target, found.wants, min(since.values()), None, None, found, among, MOST_OPENED)
        return found.rows

    try:
        return settled(counted) if since else {}
    except NotEnoughSignals:
        return dict.fromkeys(since, 0)


def reached_at(signals_root: Root, target: str, workload: str, rows: int, *, since: float, until: float, among: int) -> float | None:
    """When captured rows of `workload`, closed at `since` or later, came to `rows` (Unix seconds); None where they did not by `until`.

    None too where all workloads have `among` windows or more in that time: no more are looked through. Raises as list_windows.
    """
    found = list_windows(signals_root, target, since=since, until=until, max_windows=among).windows
    mine = [window for window in found if window.workload == workload] if len(found) < among else []
    oldest_first = sorted((window.closed_at, window.num_rows) for window in mine)
    totals = itertools.accumulate(num_rows for _, num_rows in oldest_first)
    return next((closed_at for (closed_at, _), total in zip(oldest_first, totals, strict=True) if total >= rows), None)


def read_states(windows: Sequence[SignalWindow], *, strict: bool = False,
                on_skip: Callable[[SignalWindow, str], None] | None = None) -> Iterator[WindowStates]:
    """States of `windows`, shard by shard (each opened once, one row group in memory at a time), each checked against its digest.

    A window that is damaged or gone is passed to `on_skip` (default: a warning in the log); with `strict` it raises CorruptShard.
    Raises LakeAway where the storage does not answer: then nothing is wrong with any window.
    """
    by_shard: dict[str, list[SignalWindow]] = {}
    for window in windows:
        by_shard.setdefault(window.uri, []).append(window)
    for uri, wanted in by_shard.items():
        for window, result in _read_shard(uri, sorted(wanted, key=lambda window: window.row)):
            if isinstance(result, WindowStates):
                yield result
            elif strict:
                raise CorruptShard(f"{uri}, row {window.row}: {result}; move the shard out of the lake, or read without strict")
            elif on_skip is not None:
                on_skip(window, result)
            else:
                _log.warning("skipped a window: %s, row %d: %s", uri, window.row, result)


def _first_seen(windows: Sequence[SignalWindow], seen: set[tuple[str, int, int, float]], shard: Stored,
                skipped: list[tuple[Stored, str]]) -> Iterator[SignalWindow]:
    """Windows that no newer shard has: somebody's copy of a shard must not count twice."""
    repeated = 0
    for window in windows:
        key = (window.request_id, window.start_pos, window.num_rows, window.closed_at)
        repeated += key in seen
        if key not in seen:
            yield window
        seen.add(key)
    if repeated:
        skipped.append((shard, f"repeats {repeated} windows of other shards: a copy, remove it"))


def _readable_windows(shard: Stored, target: str, skipped: list[tuple[Stored, str]]) -> tuple[SignalWindow, ...]:
    try:
        return windows_in(shard, target)
    except FileNotFoundError as error:
        raise Vanished(f"{shard} was replaced while it was read: list the windows again") from error
    except (CorruptShard, OSError, ValueError, KeyError, pa.ArrowException) as error:
        if is_away(error):
            raise away(shard, error) from error
        skipped.append((shard, str(error)))
        return ()


def _read_shard(uri: str, wanted: Sequence[SignalWindow]) -> Iterator[tuple[SignalWindow, WindowStates | str]]:
    left = list(wanted)
    try:
        with open_uri(uri) as stream, parquet_file(stream) as file:
            first_row = 0
            for group in range(file.num_row_groups):
                end_row = first_row + file.metadata.row_group(group).num_rows
                here = [window for window in left if first_row <= window.row < end_row]
                if here:
                    table = file.read_row_group(group, columns=list(_STATES), use_threads=False)
                    for window in here:
                        yield window, _decode(window, table, window.row - first_row)
                        left.remove(window)
                first_row = end_row
        reason = "the shard has no such row: it was replaced; list the windows again"
    except FileNotFoundError:
        reason = "the shard is gone (compacted or deleted): list the windows again"
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        if is_away(error):
            raise away(uri, error) from error
        reason = f"unreadable: {error}"
    for window in left:
        yield window, reason


def _decode(window: SignalWindow, table: Any, row: int) -> WindowStates | str:
    """The window's states, or what is wrong with them."""
    import torch

    from tide_pipeline.capture.rows import bf16_tensor

    cell = {name: table.column(name)[row] for name in _STATES}
    token_ids = cell["token_ids"].values.to_numpy(zero_copy_only=False)
    num_rows, hidden_size, num_taps = (cell[name].as_py() for name in ("num_rows", "hidden_size", "num_taps"))
    taps, final = cell["taps"].as_buffer(), cell["final"].as_buffer()
    if (cell["request_id"].as_py(), cell["start_pos"].as_py(), num_rows) != (window.request_id, window.start_pos, window.num_rows):
        return "the row holds another window: the shard was replaced; list the windows again"
    if window.digest and cell["digest"].as_py() != window.digest:
        return "the row holds another window of that request: the shard was replaced; list the windows again"
    if len(token_ids) != num_rows + 1 or taps.size != num_rows * num_taps * hidden_size * 2 or (
            final is not None and final.size != num_rows * hidden_size * 2):
        return f"{num_rows} rows of {num_taps} x {hidden_size} values don't fit {len(token_ids)} tokens and {taps.size} bytes of taps"
    if DIGESTS[cell["schema_version"].as_py()](token_ids, taps, final) != cell["digest"].as_py():
        return "its digest does not match: the file was altered or damaged"
    return WindowStates(window, torch.from_numpy(token_ids.astype(np.int64)), bf16_tensor(taps, num_rows),
                        None if final is None else bf16_tensor(final, num_rows), _rejected(cell["rejected"].values))


def _rejected(pairs: Any) -> Tensor:
    """[R, 2]: where each rejected draft token would have stood, and the token; None is no pair."""
    import torch

    if pairs is None:
        return torch.zeros(0, 2, dtype=torch.int32)
    columns = [pairs.field(name).to_numpy(zero_copy_only=False) for name in ("position", "token")]
    return torch.from_numpy(np.stack(columns, axis=1).astype(np.int32))
