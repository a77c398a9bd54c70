"""CRC-32 of a whole file, without passing over parts whose CRC-32 is known. Knows bytes and Parquet's page headers; opens nothing.

Bits as polynomials over GF(2):   crc(A B) = crc(A) * x^(8 |B|) + crc(B)   modulo CRC-32's polynomial
Parquet's writer puts the CRC-32 of each page into the page's header: what is left to pass over are headers and small columns.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Sequence

ReadAt = Callable[[int, int], bytes]       # offset, size -> at most so many bytes, at least one
Span = tuple[int, int]                     # offset and size

PIECE = 1 << 20                            # bytes read at a time
HEADER = 256                               # more than a page header without statistics has

_POLYNOMIAL = 0xEDB88320                   # reflected: bit 31 is x^0
_I32, _STRUCT = 5, 12                 # field types of Thrift's compact protocol


def file_crc(read: ReadAt, size: int, pages: Sequence[Span] = ()) -> int:
    """CRC-32 of a file of `size` bytes; `pages` are spans of it that hold plain Parquet pages and nothing else."""
    crc = at = 0
    for span in sorted(pages):
        for begin, length, known in _bodies(read, span):
            crc = joined(_over(read, at, begin, crc), known, length)
            at = begin + length
    return _over(read, at, size, crc)


def joined(first: int, second: int, second_bytes: int) -> int:
    """CRC-32 of two byte strings, one after the other, from the CRC-32 of each and the length of the second."""
    return _product(_shift(second_bytes), first) ^ second


def _over(read: ReadAt, at: int, end: int, crc: int) -> int:
    while at < end:
        piece = read(at, min(PIECE, end - at))
        if not piece:
            raise OSError(f"the file ends at byte {at}, {end - at} bytes too early")
        crc = zlib.crc32(piece, crc)
        at += len(piece)
    return crc


def _bodies(read: ReadAt, span: Span) -> Iterator[tuple[int, int, int]]:
    """Offset, size and CRC-32 of each page's body. From a header on that is none, or tells no CRC, bytes are passed over like the rest."""
    at, end = span[0], sum(span)
    while at < end:
        try:
            size, fields = _header(read(at, min(HEADER, end - at)))
            body, crc = fields[3], fields[4] & 0xFFFFFFFF
        except (ValueError, LookupError):
            return
        yield at + size, body, crc
        at += size + body


def _header(data: bytes) -> tuple[int, dict[int, int]]:
    """Size of the Thrift struct at the beginning of `data`, and its numbers by field id: of a page 3 is the body's size, 4 its CRC-32."""
    at, field, numbers = 0, 0, dict[int, int]()
    while head := data[at]:
        at += 1
        kind, step = head & 15, head >> 4
        if step:
            field += step
        else:
            field, at = _number(data, at)
        if kind == _I32:
            numbers[field], at = _number(data, at)
        elif kind == _STRUCT:
            at += _header(data[at:])[0]
        elif kind > 2:                     # 1 and 2 are true and false
            raise ValueError(f"a page header has no field of type {kind}, but in statistics")
    return at + 1, numbers


def _number(data: bytes, at: int) -> tuple[int, int]:
    """A zigzag number, and the offset after it."""
    value = shift = 0
    while True:
        byte = data[at]
        at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
        if byte < 128:
            return (value >> 1) ^ -(value & 1), at


@functools.lru_cache(maxsize=4096)
def _shift(num_bytes: int) -> int:
    """x^(8 num_bytes)."""
    power, square = 1 << 31, 1 << 23       # x^0, x^8
    while num_bytes:
        if num_bytes & 1:
            power = _product(square, power)
        square = _product(square, square)
        num_bytes >>= 1
    return power


def _product(a: int, b: int) -> int:
    """a * b modulo the polynomial."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product
