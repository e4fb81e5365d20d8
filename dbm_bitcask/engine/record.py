"""Record: one framed write, as bytes. No I/O here.

    record := checksum:u64 size:u32 key_end:u32 padding:u8 zero:u8 flags:u16 time:u32 [expiry:u64] key zero{padding} value

All integers are little-endian. `checksum` is XXH3-64 over everything behind it, seeded with the salt of the segment exclusive-or the
offset of the record in it: zeros, stale blocks, records of another segment, and records that stand inside values never verify. `size` and
`key_end` are counted from behind the checksum, to the end of the record and of the key: a reader needs no arithmetic to find either.
`padding` makes the length of the record a multiple of 8, so that a search for the next record behind damage tries an eighth of the
offsets. `time` is when the record was written, in seconds since 1970 modulo 2**32; it is information, and never orders anything. `expiry`,
in milliseconds since 1970 (0: never), is there if EXPIRES, ZLIB or ZSTD is flagged.

    flags := TOMBSTONE   the key is deleted; no value
           | EXPIRES     the record counts as deleted from `expiry` on
           | ZLIB, ZSTD  the value is compressed so, as `compression` says
           | BATCH       the value is a run of whole records, to be taken together; no key
           | SEAL        the segment ends here; no key, no value
           | MARK        nothing but a place for SYNCED; no key, no value
           | SYNCED      everything before this record in its segment had been synced when it was written

DO NOT renumber the flags: they are on disk. Worked example, salt 0, offset 0, time 0, key b"k", value b"v":

    0e 4f f9 db 22 ab fb e2 18 00 00 00 11 00 00 00 06 00 00 00 00 00 00 00
    6b 00 00 00 00 00 00 76

Downsides: 24 bytes of header and up to 7 of padding weigh on tiny values; a batch is limited by the size of one value.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from xxhash import xxh3_64, xxh3_64_intdigest

if TYPE_CHECKING:
    from typing import TypeAlias

    from typing_extensions import Buffer

    Value: TypeAlias = bytes | memoryview

__all__ = [
    "ALIGNMENT", "BATCH", "BODY", "CHECKSUM_SIZE", "EXPIRES", "EXTENDED", "HEADER", "LIMIT", "MARK", "SEAL", "SYNCED", "TOMBSTONE",
    "ZEROS", "ZLIB", "ZSTD", "BadRecord", "Head", "Record", "Value", "decode", "decode_head", "encode", "encode_before",
    "promised_length", "record_length", "with_checksum", "with_flags",
]  # fmt: skip

HEADER = struct.Struct("<QIIBxHI")
BODY = struct.Struct("<IIBxHI")  # the header without its checksum
_FLAGS = struct.Struct("<H")
_FLAGS_AT = struct.calcsize("<IIBx")  # in the body
_PROMISE = struct.Struct("<8xIIBBH4x")
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

EXTENDED = EXPIRES | ZLIB | ZSTD  # with these, `expiry` stands before the key

_KNOWN = TOMBSTONE | EXTENDED | BATCH | SEAL | MARK | SYNCED
ZEROS = tuple(bytes(size) for size in range(ALIGNMENT))


class BadRecord(Exception):
    """The bytes are no record: whether torn or damaged is for `contents` to say."""


class Record(NamedTuple):
    """A decoded record. `expiry` is in milliseconds, 0 if there is none; `end` is the offset behind it.

    `value` is a view of the bytes that it was decoded from, as it is stored there: who hands it to a user copies it once.
    """

    flags: int
    key: bytes
    value: Value
    time: int
    expiry: int
    end: int


class Head(NamedTuple):
    """What the header of a record says, not verified: flags, length of the record, and where its key stands in it."""

    flags: int
    length: int
    key_start: int
    key_end: int


def record_length(flags: int, key_size: int, value_size: int) -> int:
    """The bytes that a record takes in its segment.

    >>> record_length(0, 16, 100)
    144
    """
    return HEADER.size + (_U64.size if flags & EXTENDED else 0) + key_size + value_size + 7 & ~7


def encode(flags: int, key: bytes, value: Value, seed: int, time: int, expiry: int = 0) -> bytes:
    """The bytes of a record for the place that `seed` (salt ^ offset) names; `time` in seconds, `expiry` in milliseconds."""
    body = _before_value(flags, key, len(value), time, expiry) + value
    return _U64.pack(xxh3_64_intdigest(body, seed)) + body


def encode_before(flags: int, key: bytes, value: Value, seed: int, time: int, expiry: int = 0) -> bytes:
    """The bytes of the same record before its value: for a value that is too large to be copied beside them."""
    return with_checksum(_before_value(flags, key, len(value), time, expiry), value, seed)


def with_checksum(before: bytes, value: Value, seed: int) -> bytes:
    """The bytes of a record before its value, of those that stand between its checksum and the value."""
    checksum = xxh3_64(before, seed)
    checksum.update(value)
    return _U64.pack(checksum.intdigest()) + before


def _before_value(flags: int, key: bytes, value_size: int, time: int, expiry: int) -> bytes:
    key_end = BODY.size + len(key)
    if flags & EXTENDED:
        key_end += _U64.size
        key = _U64.pack(expiry) + key
    size = key_end + value_size
    padding = -size & 7
    return BODY.pack(size + padding, key_end, padding, flags, time) + key + ZEROS[padding]


def with_flags(body: bytes, flags: int) -> bytes:
    """What stands behind the checksum of a record, with these flags instead of its own."""
    own = _FLAGS.unpack_from(body, _FLAGS_AT)[0]
    return body if own == flags else body[:_FLAGS_AT] + _FLAGS.pack(flags) + body[_FLAGS_AT + _FLAGS.size :]


def decode_head(buffer: Buffer, offset: int) -> Head | None:
    """The header at `offset` of `buffer`, or None if the buffer ends within it, or if no record begins so."""
    view = memoryview(buffer)
    if len(view) - offset < HEADER.size:
        return None
    _, size, key_end, padding, flags, _ = HEADER.unpack_from(view, offset)
    key_start = BODY.size + (_U64.size if flags & EXTENDED else 0)
    if not key_start <= key_end <= key_end + padding <= size or size & 7:
        return None
    return Head(flags, CHECKSUM_SIZE + size, CHECKSUM_SIZE + key_start, CHECKSUM_SIZE + key_end)


def promised_length(buffer: Buffer, offset: int) -> int:
    """The length of the record that the 24 bytes at `offset` promise, or 0 if no record has such a header. Not verified."""
    size, key_end, padding, zero, flags = _PROMISE.unpack_from(buffer, offset)
    if size & 7 or zero or padding >= ALIGNMENT or flags & ~_KNOWN or not BODY.size <= key_end <= size:
        return 0
    return CHECKSUM_SIZE + int(size)


def decode(buffer: Buffer, offset: int, seed: int) -> Record | None:
    """The record at `offset` of `buffer`, or None if the buffer ends within it; `BadRecord` if it does not verify."""
    view = memoryview(buffer)
    left = len(view) - offset
    if left < HEADER.size:
        return None
    checksum, size, key_end, padding, flags, time = HEADER.unpack_from(view, offset)
    key_start = BODY.size + (_U64.size if flags & EXTENDED else 0)
    if not key_start <= key_end <= key_end + padding <= size or size & 7:
        raise BadRecord
    start = offset + CHECKSUM_SIZE
    if CHECKSUM_SIZE + size > left:
        return None
    body = view[start : start + size]
    if xxh3_64_intdigest(body, seed) != checksum or flags & ~_KNOWN:
        raise BadRecord
    expiry = _U64.unpack_from(body, BODY.size)[0] if flags & EXTENDED else 0
    return Record(flags, bytes(body[key_start:key_end]), body[key_end + padding :], time, expiry, start + size)
