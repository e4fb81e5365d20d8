"""Lookup: the hot path of a read.

`reader` makes the function that answers `get` for one epoch of a handle: what it needs is bound once, not fetched at each call, and the
function is replaced as a whole when the epoch moves. It decides the two ordinary cases, a verified hit and a valid miss. Everything else
(another epoch, a segment not mapped yet, a record that does not verify, an expiring or compressed one, whose key does not begin where it
looks) it leaves to `slow`, which does the whole search again. The masks are those of `header` and `page`, as constants. What is large is
verified in the map, and its value copied out of it once.

The length of the function is the price of one call a get instead of five; `python -m compat.peers` shows what that is worth.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from xxhash import xxh3_64_intdigest

from .files import fence
from .header import BASE, EPOCH
from .page import SLOT_MASK

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .files import Map
    from .header import Words
    from .page import Table

__all__ = ["reader"]

_LARGE = 2**14  # bytes of a record from which on to copy it takes longer than to look at it where it is
_HEAD = struct.Struct("<QIIB")  # the beginning of a record's header, as far as a read needs it


def reader(
    table: Table,
    epoch: int,
    generation: tuple[Words, int],
    segments: Mapping[int, tuple[Map, int]],
    slow: Callable[[bytes], bytes | None],
) -> Callable[[bytes], bytes | None]:
    """A function key -> value, or None if the key is not there.

    `generation` is the word of the active segment's header that holds it, and what it held; `segments` maps ids to (bytes, salt).
    """
    words, directory, shift, seed, checked = table
    header, generation_then = generation
    assert (BASE, SLOT_MASK) == (0x1FFFFFFFE00, 0x1FE)
    xxh3, unpack = xxh3_64_intdigest, _HEAD.unpack_from

    def get(key: bytes) -> bytes | None:
        hashed = xxh3(key, seed)
        index = hashed >> shift
        entry = directory[index]
        if words[EPOCH] != epoch or header[0] != generation_then or not checked[index]:
            return slow(key)
        base = entry & 0x1FFFFFFFE00
        place = base | hashed & 0x1FE
        try:
            while word := words[place]:
                if word == hashed:
                    location = words[place + 1]
                    data, salt = segments[location >> 32]
                    offset = location & 0xFFFFFFFF
                    near = data[offset : offset + 192]  # one trip to memory for most records, instead of two
                    checksum, size, key_end, padding = unpack(near)
                    if size > 184:
                        if size > _LARGE:
                            body = data[offset + 24 : offset + 24 + len(key)]
                            if body != key or key_end != 16 + len(key):
                                return slow(key)
                            if xxh3(memoryview(data)[offset + 8 : offset + 8 + size], salt ^ offset) != checksum:
                                return slow(key)
                            return data[offset + 8 + key_end + padding : offset + 8 + size]
                        near = data[offset : offset + 8 + size]
                    body = near[8 : 8 + size]
                    if body[16:key_end] != key or xxh3(body, salt ^ offset) != checksum:
                        return slow(key)
                    return body[key_end + padding :]
                place = base | place + 2 & 0x1FE
                if place == base | hashed & 0x1FE:
                    return slow(key)
        except (KeyError, IndexError, struct.error):
            return slow(key)
        if fence:
            fence()
        if directory[index] == entry and words[EPOCH] == epoch:
            return None
        return slow(key)

    return get
