"""Hint: the keys of a sealed segment, without the values. No I/O here.

    hint   := marker:8s id:u64 salt:u64 length:u64 count:u64 key{count} checksum:u64
    key    := offset:u32 size:u32 key_size:u32 flags:u16 zero:u16 [expiry:u64] key

All integers are little-endian. A key stands for one record of the segment, in the order of the log: `offset` and `size` (the bytes that
the record takes) are its place, flags and expiry those of the record, tombstones included; seals, marks and the frames of batches are
left out, the records of a batch are listed one by one. `id`, `salt` and `length` bind the hint to the segment as the manifest lists it.
`checksum` is XXH3-64 over the head, seeded with that over the keys (the head is known last).

A hint is a cache: deleting it costs time, nothing else. It is for rebuilding the keydir and for walking keys without touching values.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from xxhash import xxh3_64, xxh3_64_intdigest

from .manifest import SHORTEST
from .record import EXPIRES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from typing_extensions import Buffer

    from .manifest import Entry

__all__ = ["Hint", "HintWriter", "decode", "is_bound", "longest"]

_MARKER = b"bc.hint\1"
_HEAD = struct.Struct("<8sQQQQ")
_KEY = struct.Struct("<IIIHxx")
_U64 = struct.Struct("<Q")


class Hint(NamedTuple):
    """One record of a segment, without its value. `size` is the bytes that it takes; `expiry` is in milliseconds, 0 if there is none."""

    offset: int
    size: int
    flags: int
    key: bytes
    expiry: int = 0


class HintWriter:
    """Encodes a hint piece by piece, so that a large one never stands in memory as a whole.

    The head holds the number of keys, which is known last: `head()` is written over the first bytes at the end.
    """

    def __init__(self, segment: Entry) -> None:
        self._segment = segment
        self._count = 0
        self._hash = xxh3_64()

    def body(self, keys: Iterable[Hint]) -> bytes:
        """The bytes of some more keys."""
        parts = []
        for offset, size, flags, key, expiry in keys:
            extension = _U64.pack(expiry) if flags & EXPIRES else b""
            parts.append(_KEY.pack(offset, size, len(key), flags) + extension + key)
        self._count += len(parts)
        data = b"".join(parts)
        self._hash.update(data)
        return data

    def head(self) -> bytes:
        return _HEAD.pack(_MARKER, *self._segment, self._count)

    def checksum(self) -> bytes:
        return _U64.pack(xxh3_64_intdigest(self.head(), self._hash.intdigest()))


def longest(segment: Entry) -> int:
    """The bytes that a hint takes at most: a key takes fewer in it than its record does in the segment."""
    return _HEAD.size + segment.length + _U64.size


def is_bound(buffer: Buffer, segment: Entry) -> bool:
    """Whether these bytes are an undamaged hint of this very segment, whose keys can be decoded. O(bytes)."""
    view = memoryview(buffer)
    if len(view) < _HEAD.size + _U64.size:
        return False
    if _HEAD.unpack_from(view)[:4] != (_MARKER, *segment):
        return False
    (checksum,) = _U64.unpack_from(view, len(view) - _U64.size)
    body = xxh3_64_intdigest(view[_HEAD.size : -_U64.size])
    return bool(xxh3_64_intdigest(view[: _HEAD.size], body) == checksum) and _is_in_order(view, segment.length)


def _is_in_order(view: memoryview, length: int) -> bool:
    """Whether the keys fill the hint, and their records follow each other in the segment: no checksum says so of what somebody made up."""
    at, end = _HEAD.size, len(view) - _U64.size
    last = end - _KEY.size
    behind = SHORTEST
    unpack, size_of_key = _KEY.unpack_from, _KEY.size
    while at <= last:
        offset, size, key_size, flags = unpack(view, at)
        if offset < behind:
            return False
        behind = offset + size
        at += size_of_key + key_size + (_U64.size if flags & EXPIRES else 0)
    return at == end and behind <= length


def decode(buffer: Buffer) -> Iterator[Hint]:
    """The keys of a hint that `is_bound`."""
    view = memoryview(buffer)
    at = _HEAD.size
    end = len(view) - _U64.size
    unpack, size_of_key, new = _KEY.unpack_from, _KEY.size, tuple.__new__  # a third faster than Hint(...)
    while at < end:
        offset, size, key_size, flags = unpack(view, at)
        at += size_of_key
        expiry = 0
        if flags & EXPIRES:
            (expiry,) = _U64.unpack_from(view, at)
            at += _U64.size
        yield new(Hint, (offset, size, flags, bytes(view[at : at + key_size]), expiry))
        at += key_size
