"""Valid bytes of each format, by chance, and what makes their checksums right again when something was changed in them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

from xxhash import xxh3_64_intdigest

from dbm_bitcask.engine import header, hint, manifest, names, record, segment
from dbm_bitcask.engine.manifest import Entry, Manifest
from parsers import BOOT, DEVICE, INODE, SALT

if TYPE_CHECKING:
    from collections.abc import Callable

U32, U64 = 2**32, 2**64


def a_record(chance: random.Random, offset: int = 0) -> bytes:
    flags = chance.choice([0, 0, 0, record.TOMBSTONE, record.EXPIRES, record.SEAL, record.MARK, record.SYNCED, record.ZLIB])
    key, value = chance.randbytes(chance.choice([0, 1, 5, 16, 40])), chance.randbytes(chance.choice([0, 1, 8, 100, 300]))
    return record.encode(flags, key, value, SALT ^ offset, 1_700_000_000, chance.choice([0, 5, U64 - 1]))


def some_records(chance: random.Random) -> bytes:
    data = segment.MARKER + bytes(segment.FIRST_RECORD - 8)
    for _ in range(chance.randrange(1, 8)):
        if chance.random() < 0.2:
            data += a_batch(chance, len(data))
        data += a_record(chance, len(data))
    return data


def a_batch(chance: random.Random, offset: int) -> bytes:
    inner = b""
    for _ in range(chance.randrange(3)):
        inner += a_record(chance, offset + record.HEADER.size + len(inner))
    return record.encode(record.BATCH, b"", inner, SALT ^ offset, 1_700_000_000)


def a_manifest(chance: random.Random) -> bytes:
    ids = sorted(chance.sample(range(1, 100), chance.randrange(1, 6)))
    entries = [Entry(number, chance.randrange(U64), chance.randrange(1, 2**33)) for number in ids]
    entries[-1] = entries[-1]._replace(length=0)
    return manifest.encode(Manifest(chance.randrange(U64), ids[-1] + 1 + chance.randrange(5), tuple(entries)))[0]


def a_hint(chance: random.Random) -> bytes:
    writer = hint.HintWriter(Entry(chance.randrange(1, U32), chance.randrange(U64), chance.randrange(U32)))
    keys = [
        hint.Hint(32 + 40 * n, 40, chance.choice([0, 1, 2]), chance.randbytes(chance.randrange(20)), 5) for n in range(chance.randrange(6))
    ]
    body = writer.body(keys)
    return writer.head() + body + writer.checksum()


def a_name(chance: random.Random) -> bytes:
    number = chance.choice([1, 7, 99999999, 100000000, U32 - 1, U32, chance.randrange(U32)])
    text = chance.choice([names.segment_name(number), names.hint_name(number), names.temporary_name("keydir"), names.MANIFEST])
    return text.encode(chance.choice(["utf-8", "utf-16-le"]))


def a_header(chance: random.Random) -> bytes:
    data = bytearray(chance.choice([4, 5, 9]) * header.PAGE_SIZE)
    words = memoryview(data).cast("Q")
    words[header.MAGIC], words[header.STATE], words[header.CURRENT] = header.MAGIC_WORD, chance.randrange(8), header.COUNTERS_A
    words[header.ROOT], words[header.TABLE] = 2 | 9 << 32, 1 | 1 << 32
    words[header.PAGES], words[header.CAPACITY] = 4, 4
    return reseal_header(bytes(data))


def reseal_record(data: bytes, offset: int = 0, salt: int = SALT) -> bytes:
    """The checksum of whatever record begins here made right, if the bytes have room for it."""
    if len(data) < offset + 12:
        return data
    end = offset + 8 + int.from_bytes(data[offset + 8 : offset + 12], "little")
    return data[:offset] + xxh3_64_intdigest(data[offset + 8 : end], salt ^ offset).to_bytes(8, "little") + data[offset + 8 :]


def reseal_records(data: bytes, salt: int = SALT) -> bytes:
    offset = segment.FIRST_RECORD
    while offset + 12 <= len(data):
        data = reseal_record(data, offset, salt)
        offset += 8 + max(8, int.from_bytes(data[offset + 8 : offset + 12], "little")) & -8
    return data


def reseal_manifest(data: bytes) -> bytes:
    return data[:-8] + xxh3_64_intdigest(data[:-8]).to_bytes(8, "little") if len(data) > 8 else data


def reseal_hint(data: bytes) -> bytes:
    if len(data) < 48:
        return data
    return data[:-8] + xxh3_64_intdigest(data[:40], xxh3_64_intdigest(data[40:-8])).to_bytes(8, "little")


def reseal_header(data: bytes) -> bytes:
    """The words that bind a keydir to its place, and its seal."""
    if len(data) < 4 * header.PAGE_SIZE:
        return data
    image = bytearray(data[: len(data) & -header.PAGE_SIZE])
    words = memoryview(image).cast("Q")
    words[header.DEVICE], words[header.INODE] = DEVICE, INODE
    words[header.BOOT_LOW], words[header.BOOT_HIGH] = BOOT & U64 - 1, BOOT >> 64
    words[header.SEAL] = header.header_checksum(words)
    return bytes(image)


def as_it_is(data: bytes) -> bytes:
    return data


class Format(NamedTuple):
    """How valid bytes are made, and made valid again; of which width its fields are; and how many inputs are tried."""

    valid: Callable[[random.Random], bytes]
    reseal: Callable[[bytes], bytes]
    width: int
    share: int


FORMATS = {
    "record": Format(a_record, reseal_record, 4, 70),
    "segment": Format(some_records, reseal_records, 4, 20),
    "manifest": Format(a_manifest, reseal_manifest, 8, 35),
    "hint": Format(a_hint, reseal_hint, 4, 35),
    "names": Format(a_name, as_it_is, 1, 35),
    "header": Format(a_header, reseal_header, 8, 8),
}
