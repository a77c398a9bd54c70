"""What a window's digest is made of. Knows bytes; knows neither files nor columns.

# words of a window's taps or final states, 64 bits each     row sums     all modulo 2^64
#      w00 w01 w02                                           w00 + w01 + w02
#      w10 w11 w12                                           w10 + w11 + w12
# column sums  w00 + w10  ...
A change within one row changes a column's sum, one within a column a row's: what goes unseen changes two words of two rows at least, by
amounts that cancel twice. Flipped bits on a disk don't; the CRC-32 of each page and of the file stands beside it (docs/decisions/0008).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tide_pipeline.capture.schema import token_bytes

Digest = Callable[[Sequence[int], Any, Any | None], str]


def window_digest(token_ids: Sequence[int], taps: Any, final: Any | None) -> str:
    """SHA-256 over the int32 tokens, then of the taps, then of the final states: the sums of rows, the sums of columns."""
    digest = hashlib.sha256(token_bytes(token_ids))
    for states in (taps, final):
        if states is not None:
            words_TW = _words(states, len(token_ids) - 1)
            digest.update(np.add.reduce(words_TW, axis=1))
            digest.update(np.add.reduce(words_TW, axis=0))
    return digest.hexdigest()


def bytes_digest(token_ids: Sequence[int], taps: Any, final: Any | None) -> str:
    """SHA-256 over the int32 tokens, the taps' bytes and the final states' bytes."""
    digest = hashlib.sha256(token_bytes(token_ids))
    digest.update(taps)
    if final is not None:
        digest.update(final)
    return digest.hexdigest()


DIGESTS: dict[int, Digest] = {1: bytes_digest, 2: window_digest}           # by the row's schema_version


def _words(states: Any, num_rows: int) -> NDArray[np.uint64]:
    """[num_rows, W]: little-endian words; a row that ends within one is filled up with zeros."""
    rows = np.frombuffer(states, np.uint8).reshape(num_rows, -1)
    if missing := -rows.shape[1] % 8:
        rows = np.pad(rows, ((0, 0), (0, missing)))
    words: NDArray[np.uint64] = rows.view("<u8")
    return words
