"""Lookup: the hot path of a read.

`reader` makes the function that answers `get` for one epoch of a handle: what it needs is bound once, not fetched at each call, and the
function is replaced as a whole when the epoch moves. It decides the two ordinary cases, a verified hit and a valid miss. Everything
else (another epoch, a segment not mapped yet, a record that does not verify) it leaves to `slow`, which may do the whole search again.

The length of the function is the price of one call a get instead of five; `python -m compat.peers` shows what that is worth.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from xxhash import xxh3_64_intdigest

from .header import EPOCH
from .record import HEADER

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from typing_extensions import Buffer

    from .page import Table

__all__ = ["reader"]


def reader(
    table: Table, epoch: int, segments: Mapping[int, tuple[Buffer, int]], slow: Callable[[bytes], bytes | None]
) -> Callable[[bytes], bytes | None]:
    """A function key -> value, or None if the key is not there. `segments` maps ids to (bytes, salt)."""
    words, directory, shift, seed, checked = table
    xxh3, unpack = xxh3_64_intdigest, HEADER.unpack_from

    def get(key: bytes) -> bytes | None:
        hashed = xxh3(key, seed)
        index = hashed >> shift
        entry = directory[index]
        if words[EPOCH] != epoch or not checked[index]:
            return slow(key)
        base = (entry & 0xFFFFFFFF) << 9
        place = start = hashed & 0x1FE
        try:
            while word := words[base + place]:
                if word == hashed:
                    location = words[base + place + 1]
                    data, salt = segments[location >> 32]
                    offset = location & 0xFFFFFFFF
                    checksum, key_size, value_size, _, flags = unpack(data, offset)
                    middle = 16 + key_size
                    end = middle + value_size
                    body = data[offset + 8 : offset + (end + 15 & -8)]
                    if xxh3(body, salt ^ offset) != checksum or body[16:middle] != key or flags & 0xFF7F:
                        return slow(key)
                    return body[middle:end]
                place = (place + 2) & 0x1FE
                if place == start:
                    return slow(key)
        except (KeyError, IndexError, struct.error):
            return slow(key)
        if directory[index] == entry and words[EPOCH] == epoch:
            return None
        return slow(key)

    return get
