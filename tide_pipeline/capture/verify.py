"""Read a lake through and say what is wrong with it. Knows every check there is; repairs nothing.

    truncated    no complete Parquet file, or one that can't be read
    altered      the bytes are not those that the name's checksum was made of
    damaged      a window's digest does not match its tokens and states
    mislabelled  states that the named engine did not make: of another width, or they don't give the tokens that it emitted
    copied       windows that another live shard has too, or a file of the same bytes
    exposed      a local file that others may read
    stale        made by an engine that is not served now: nothing wrong with it, training passes over it
"""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import torch
from torch import Tensor

from tide_pipeline.capture.index import windows_in
from tide_pipeline.capture.layout import survey
from tide_pipeline.capture.names import checksum
from tide_pipeline.capture.reader import WindowStates, read_states
from tide_pipeline.capture.rewrite import read_groups
from tide_pipeline.capture.store import Root, Stored
from tide_pipeline.errors import CorruptShard

HARMLESS = ("stale",)
MIN_AGREEMENT = 0.9                # of greedy tokens that bf16 final states must give back: ties and rounding cost less than a tenth
CHECKED_ROWS = 64                  # of a window

WindowKey = tuple[str, int, int, float]


@dataclass(frozen=True)
class EngineFacts:
    """What tells one engine's states from another's."""

    digest: str
    hidden_size: int
    num_taps: int
    lm_head_VD: Tensor | None = None       # fp32; None leaves the emitted tokens unchecked


@dataclass(frozen=True)
class Finding:
    shard: str
    kind: str
    detail: str


@dataclass
class Verification:
    shards: int = 0
    windows: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        return all(finding.kind in HARMLESS for finding in self.findings)


def verify_signals(root: Root, target: str, engine: EngineFacts | None = None) -> Verification:
    """Check every live shard of `signals/`; states against `engine` where one is given. Raises LakeError when it can't be listed."""
    found, seen, sums = Verification(), dict[WindowKey, str](), dict[tuple[int, int], str]()
    for shard in _live(root, target, found, sums):
        try:
            windows = windows_in(shard, target)
        except (CorruptShard, OSError, ValueError, KeyError, pa.ArrowException) as error:
            found.findings.append(Finding(shard.uri, "truncated", str(error)))
            continue
        found.windows += len(windows)
        problems: Counter[tuple[str, str]] = Counter()
        for w in windows:
            other = seen.setdefault((w.request_id, w.start_pos, w.num_rows, w.closed_at), shard.uri)
            if other != shard.uri:
                problems["copied", f"windows that {other} has too"] += 1
        skipped: list[str] = []
        for states in read_states(windows, on_skip=lambda _, reason: skipped.append(reason)):  # noqa: B023 - read within the loop
            if engine is not None and (problem := _mislabelled(states, engine)):
                problems[problem] += 1
        problems.update(("damaged", f"windows: {reason}") for reason in skipped)
        found.findings += [Finding(shard.uri, kind, f"{count} {text}") for (kind, text), count in problems.items()]
    return found


def verify_acceptance(root: Root, target: str) -> Verification:
    """Check every live shard of `acceptance/`."""
    found = Verification()
    for shard in _live(root, target, found, {}):
        try:
            for _ in read_groups(shard):
                pass
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            found.findings.append(Finding(shard.uri, "damaged", str(error)))
    return found


def _live(root: Root, target: str, found: Verification, sums: dict[tuple[int, int], str]) -> Iterator[Stored]:
    """Live shards, the checks of whole files made."""
    listing = survey(root, target)
    found.findings += [Finding(file.uri, "truncated", reason) for file, reason in listing.skipped]
    for shard in listing.live:
        found.shards += 1
        if shard.store.is_local and os.stat(shard).st_mode & 0o077:
            found.findings.append(Finding(shard.uri, "exposed", f"others may read it: chmod 600 {shard.uri}"))
        crc, wanted = _crc(shard), checksum(shard)
        if wanted is not None and crc != wanted:
            found.findings.append(Finding(shard.uri, "altered", f"its bytes have CRC-32 {crc:08x}, written were {wanted:08x}"))
        other = sums.setdefault((shard.size, crc), shard.uri)
        if other != shard.uri:
            found.findings.append(Finding(shard.uri, "copied", f"the same bytes as {other}"))
        yield shard


def _crc(shard: Stored) -> int:
    crc = 0
    with shard.open() as stream:
        while piece := stream.read(2**22):
            crc = zlib.crc32(piece, crc)
    return crc


def _mislabelled(states: WindowStates, engine: EngineFacts) -> tuple[str, str] | None:
    """(kind, what) when these are not states of `engine`."""
    w = states.window
    if w.engine_digest != engine.digest:
        return "stale", f"windows of engine {w.engine_digest[:12]}, served is {engine.digest[:12]}"
    if states.taps_TG.shape[1] != engine.num_taps * engine.hidden_size:
        return "mislabelled", f"windows are {states.taps_TG.shape[1]} wide, the engine's {engine.num_taps * engine.hidden_size}"
    first = max(0, w.num_prompt_tokens - 1 - w.start_pos)          # the row that gave the first generated token
    if states.final_TD is None or engine.lm_head_VD is None or w.temperature != 0 or first >= w.num_rows:
        return None
    final_TD, emitted = states.final_TD[first:first + CHECKED_ROWS], states.token_ids[first + 1:][:CHECKED_ROWS]
    given = (final_TD.float() @ engine.lm_head_VD.T).argmax(-1)
    agreement = (given == emitted).to(torch.float32).mean().item()
    return None if agreement >= MIN_AGREEMENT else ("mislabelled", "windows whose states don't give the tokens that were emitted")
