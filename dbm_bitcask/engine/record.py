"""Record: one framed write, as bytes. No I/O here.

    record   := checksum:u64 key_size:u32 value_size:u32 time:u32 flags:u16 zero:u16 [expiry:u64] key value padding

All integers are little-endian. `checksum` is XXH3-64 over everything behind it, padding included, seeded with the salt of the segment
exclusive-or the offset of the record in it: zeros, stale blocks, records of another segment, and records that stand inside values never
verify. `time` is when the record was written, in seconds since 1970; it is information, and never orders anything. `expiry`, in
milliseconds since 1970, is there if flagged. `padding` is zeros up to the next multiple of 8, so that a search for the next record
behind damage tries an eighth of the offsets.

    flags    := TOMBSTONE   the key is deleted; no value
              | EXPIRES     `expiry` is there
              | ZLIB, ZSTD  the value is compressed so
              | BATCH       the value is a run of whole records, to be taken together; no key
              | SEAL        the segment ends here; no key, no value
              | MARK        nothing but a place for SYNCED; no key, no value
              | SYNCED      everything before this record in its segment had been synced when it was written

DO NOT renumber the flags: they are on disk. Worked example, salt 0, offset 0, time 0, key b"k", value b"v":

    2b bb 29 4d 68 6b 4c 94   01 00 00 00   01 00 00 00   00 00 00 00   00 00   00 00   6b   76   00 00 00 00 00 00

Downsides: 24 bytes of header and up to 7 of padding weigh on tiny values; a batch is limited by the size of one value.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from xxhash import xxh3_64_intdigest

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "BATCH", "EXPIRES", "HEADER", "LIMIT", "MARK", "SEAL", "SYNCED", "TOMBSTONE", "ZLIB", "ZSTD",
    "BadRecord", "Record", "decode", "encode", "record_length",
]  # fmt: skip

HEADER = struct.Struct("<QIIIHxx")
_TAIL = struct.Struct("<IIIHxx")  # the header without its checksum
_U64 = struct.Struct("<Q")
CHECKSUM_SIZE = _U64.size
ALIGNMENT = 8
LIMIT = 2**32  # a location has 32 bits for the offset: a record must end below this

TOMBSTONE = 0x01
EXPIRES = 0x02
ZLIB = 0x04
ZSTD = 0x08
BATCH = 0x10
SEAL = 0x20
MARK = 0x40
SYNCED = 0x80

_KNOWN = TOMBSTONE | EXPIRES | ZLIB | ZSTD | BATCH | SEAL | MARK | SYNCED
_PADDING = tuple(bytes(-size % ALIGNMENT) for size in range(ALIGNMENT))


class BadRecord(Exception):
    """The bytes are no record: whether torn or damaged is for `recovery` to say."""


class Record(NamedTuple):
    """A decoded record. `end` is the offset behind its padding."""

    flags: int
    key: bytes
    value: bytes
    time: int
    expiry: int | None
    end: int


def record_length(flags: int, key_size: int, value_size: int) -> int:
    """The bytes that a record takes in its segment.

    >>> record_length(0, 16, 100)
    144
    """
    return (HEADER.size + (_U64.size if flags & EXPIRES else 0) + key_size + value_size + 7) & ~7


def encode(flags: int, key: bytes, value: bytes, seed: int, time: int, expiry: int | None = None) -> bytes:
    """The bytes of a record for the place that `seed` (salt ^ offset) names; `time` in seconds, `expiry` in milliseconds."""
    size = len(key) + len(value)
    if expiry is None:
        body = _TAIL.pack(len(key), len(value), time, flags) + key + value + _PADDING[size & 7]
    else:
        head = _TAIL.pack(len(key), len(value), time, flags | EXPIRES) + _U64.pack(expiry)
        body = head + key + value + _PADDING[size & 7]
    return _U64.pack(xxh3_64_intdigest(body, seed)) + body


def decode(buffer: Buffer, offset: int, seed: int) -> Record | None:
    """The record at `offset` of `buffer`, or None if the buffer ends within it; `BadRecord` if it does not verify."""
    view = memoryview(buffer)[offset:]
    if len(view) < HEADER.size:
        return None
    checksum, key_size, value_size, time, flags = HEADER.unpack_from(view)
    length = record_length(flags, key_size, value_size)
    if length > len(view):
        return None
    if xxh3_64_intdigest(view[CHECKSUM_SIZE:length], seed) != checksum or flags & ~_KNOWN:
        raise BadRecord
    start = HEADER.size
    expiry = None
    if flags & EXPIRES:
        (expiry,) = _U64.unpack_from(view, start)
        start += _U64.size
    middle = start + key_size
    return Record(
        flags, bytes(view[start:middle]), bytes(view[middle : middle + value_size]), time, expiry, offset + length
    )
