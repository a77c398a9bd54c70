"""Rows of states on their way from a ring to a shard, and back: bf16 as 16-bit words, which numpy can hold. Knows neither tokens nor files.

numpy and not torch: a step copies a few rows for each request, and a slice and a copy of torch cost several times as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.int16]                  # [N, W], the bits of bf16

CHUNK_ROWS = 32                            # an open window grows by so many


def words_of(rows_NW: Tensor) -> Words:
    """The bits of bf16 rows on the host, without a copy."""
    assert rows_NW.dtype == torch.bfloat16
    words: Words = rows_NW.view(torch.int16).numpy()       # torch bf16 has no numpy type
    return words


def bf16_tensor(data: Any, num_rows: int) -> Tensor:
    """A fresh bf16 tensor [num_rows, X] from such bytes (anything with the buffer protocol). One copy, bits preserved."""
    words = np.frombuffer(data, dtype="<i2").reshape(num_rows, -1)
    return torch.from_numpy(words.astype(np.int16)).view(torch.bfloat16)


class OpenRows:
    """Rows of a window that is still open, in chunks: each row is copied once on its way in, and never to make room."""

    def __init__(self) -> None:
        self._chunks: list[Words] = []
        self._free = 0                     # rows of the last chunk

    def add(self, words_NW: Words) -> None:
        """Copy rows in."""
        done, n = 0, len(words_NW)
        while done < n:
            if not self._free:
                self._chunks.append(np.empty((CHUNK_ROWS, words_NW.shape[1]), dtype=np.int16))
                self._free = CHUNK_ROWS
            take = min(n - done, self._free)
            start = CHUNK_ROWS - self._free
            self._chunks[-1][start:start + take] = words_NW[done:done + take]
            self._free -= take
            done += take

    def first(self, count: int) -> list[Words]:
        """The first `count` rows, as they lie."""
        chunks = self._chunks[:-(-count // CHUNK_ROWS)]
        return [chunk[:count - i * CHUNK_ROWS] for i, chunk in enumerate(chunks)]


def write_words(parts: Sequence[Words], columns: slice, out: NDArray[np.uint8]) -> None:
    """Write these columns of the rows as little-endian bf16, row-major, into `out` (exactly as many bytes). One copy."""
    rows, width = sum(map(len, parts)), len(range(*columns.indices(parts[0].shape[1])))
    assert out.nbytes == 2 * rows * width
    table, start = out.view("<i2").reshape(rows, width), 0
    for part in parts:
        table[start:start + len(part)] = part[:, columns]
        start += len(part)
