"""Packed batches of captured rows. The batch of a step depends on (seed, step) alone, so a resumed run goes on exactly.

    row t of a window:   taps g_t, next token x_{t+1}, label x_{t+2}, teacher state f_{t+1}; the last row has no label

A batch row is filled with slices of windows, each its own segment; a slice keeps the positions it was captured at.

B = batch rows, T = token rows, G = width of the taps, D = hidden size. Knows no draft and no files.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from tide_pipeline.capture.reader import WindowStates
from tide_pipeline.contracts import SignalWindow

S = TypeVar("S", SignalWindow, WindowStates)       # a window whose states are not read yet, or with them

NO_LABEL = -1
MIN_SLICE = 16                     # shorter crops teach a draft that has lost its context


@dataclass(frozen=True)
class Batch:
    """Rows of several windows, side by side."""

    taps_BTG: Tensor               # bf16
    next_ids_BT: Tensor            # x_{t+1}
    labels_BT: Tensor              # x_{t+2}; NO_LABEL where it is not known
    teacher_BTD: Tensor | None     # f_{t+1}, bf16; None when the engine stores no final states
    positions_BT: Tensor           # rotary position
    segments_BT: Tensor            # which slice a row belongs to; -1 for padding
    offsets_BT: Tensor             # row number inside its slice
    windows: tuple[tuple[SignalWindow, ...], ...]     # [b][segment]: where its rows come from
    weights_BT: Tensor | None = None                  # of rows in the loss; None is 1 for all

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device."""
        moved: dict[str, Any] = {f.name: value.to(device) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        return replace(self, **moved)

    @property
    def num_rows(self) -> int:
        return int((self.segments_BT >= 0).sum())


@dataclass(frozen=True)
class Slice(Generic[S]):
    """Rows start .. start+rows of one window."""

    source: S
    start: int
    rows: int

    @property
    def num_labelled(self) -> int:
        """Rows with a label: all but the last row of a window."""
        return min(self.start + self.rows, self.source.num_rows - 1) - self.start


def pack(rows: Sequence[Sequence[Slice[WindowStates]]], width: int, reject_weight: float = 0.0) -> Batch:
    """Lay slices side by side: one inner sequence per batch row, at most `width` token rows each."""
    first = rows[0][0].source
    B, G = len(rows), first.taps_TG.shape[1]
    taps = torch.zeros(B, width, G, dtype=torch.bfloat16)
    teacher = None if first.final_TD is None else torch.zeros(B, width, first.final_TD.shape[1], dtype=torch.bfloat16)
    ids, positions, offsets = (torch.zeros(B, width, dtype=torch.int64) for _ in range(3))
    labels, segments = (torch.full((B, width), -1, dtype=torch.int64) for _ in range(2))
    weights = None if reject_weight == 0 else torch.ones(B, width)
    for b, slices in enumerate(rows):
        at = 0
        for segment, cut in enumerate(slices):
            s, e = cut.start, cut.start + cut.rows
            labelled = cut.num_labelled
            here = slice(at, at + cut.rows)
            taps[b, here] = cut.source.taps_TG[s:e]
            ids[b, here] = cut.source.token_ids[s + 1 : e + 1]
            labels[b, at : at + labelled] = cut.source.token_ids[s + 2 : s + 2 + labelled]
            if teacher is not None:
                assert cut.source.final_TD is not None, "windows with and without final states in one batch"
                teacher[b, at : at + labelled] = cut.source.final_TD[s + 1 : s + 1 + labelled]
            offsets[b, here] = torch.arange(cut.rows)
            positions[b, here] = cut.source.window.start_pos + s + offsets[b, here]
            segments[b, here] = segment
            if weights is not None:
                weights[b, at + rejected_rows(cut)] += reject_weight
            at += cut.rows
    windows = tuple(tuple(cut.source.window for cut in slices) for slices in rows)
    return Batch(taps, ids, labels, teacher, positions, segments, offsets, windows, weights)


def labelled_rows(rows: Sequence[Sequence[Slice[S]]], depths: int) -> list[int]:
    """How many rows have a label at depth 0, 1, ...: row t of depth j needs an anchor, row t-j of its slice."""
    return [sum(max(cut.num_labelled - j, 0) for slices in rows for cut in slices) for j in range(depths)]


def rejected_rows(cut: Slice[WindowStates]) -> Tensor:
    """Labelled rows of the slice, counted from its start, at which the draft that served proposed a token that the target refused.

    A token rejected at position p was drafted for x_p, which is what row p - 2 predicts; the window begins at row start_pos.
    """
    at_R = cut.source.rejected_R2[:, 0].long() - 2 - cut.source.window.start_pos - cut.start
    return torch.unique(at_R[(at_R >= 0) & (at_R < cut.num_labelled)])  # type: ignore[no-any-return, no-untyped-call]


def rejected_counts(rows: Sequence[Sequence[Slice[WindowStates]]], depths: int) -> list[int]:
    """Of `labelled_rows`, those that `rejected_rows` names."""
    at = [rejected_rows(cut) for slices in rows for cut in slices]
    return [sum(int((at_R >= j).sum()) for at_R in at) for j in range(depths)]


@dataclass(frozen=True)
class Sampler(Generic[S]):
    """Draws batches from the drifted workload's windows and from the replay set."""

    focus: Sequence[S]
    replay: Sequence[S]
    batch_rows: int
    window_rows: int
    replay_share: float
    seed: int

    def slices(self, step: int) -> list[list[Slice[S]]]:
        """The batch of `step`, row by row. Over any run of steps, `replay_share` of the rows are replay, as evenly as can be."""
        chance = random.Random(f"{self.seed}/{step}")                       # noqa: S311 - not for secrets
        first = step * self.batch_rows
        return [self._fill(self._pool(first + b), chance) for b in range(self.batch_rows)]

    def _pool(self, n: int) -> Sequence[S]:
        if not self.replay or not self.focus:
            return self.focus or self.replay
        return self.replay if int((n + 1) * self.replay_share) > int(n * self.replay_share) else self.focus

    def _fill(self, pool: Sequence[S], chance: random.Random) -> list[Slice[S]]:
        slices: list[Slice[S]] = []
        room = self.window_rows
        while not slices or room >= MIN_SLICE:
            source = pool[chance.randrange(len(pool))]
            rows = min(room, source.num_rows)
            slices.append(Slice(source, chance.randint(0, source.num_rows - rows), rows))
            room -= rows
        return slices


def whole(windows: Sequence[WindowStates]) -> Batch:
    """Whole windows, one per batch row, padded to the longest."""
    return pack([[Slice(w, 0, len(w.taps_TG))] for w in windows], max(len(w.taps_TG) for w in windows))
